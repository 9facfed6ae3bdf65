"""``hywu lora ...``: LoRA files in other forms, as PEFT folders and back, and out of two checkpoints.

Owns the commands' arguments and what they print; the work is ``lora/``'s. Other commands are ``cli.py``'s.
"""

import argparse
import io
from pathlib import Path

from .errors import RequestError
from .terminal import Terminal


def _form_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--stored", default="as it is", choices=("as it is", "bfloat16", "fp8"),
                        help="fp8: e4m3 with a scale a row, little more than half of bfloat16 (default: 'as it is')")
    parser.add_argument("--keep", type=float, default=1.0,
                        help="share of the routed experts' energy to keep, above 0 and at most 1; the experts beyond it are "
                             "left out of the file (default: 1, all of them)")


def save_as_parser():
    parser = argparse.ArgumentParser(
        prog="hywu lora save-as", description="Write a LoRA file in another form. Says by how much the update changed.")
    parser.add_argument("source", type=Path, help="LoRA file")
    parser.add_argument("target", type=Path, help="LoRA file to write (.safetensors)")
    _form_options(parser)
    return parser, _save_as


def _save_as(options: argparse.Namespace) -> None:
    from PIL import Image

    from .lora.files import load_lora, read_summary

    _check_new(options.target)
    thumbnail = read_summary(options.source).thumbnail
    picture = None if thumbnail is None else Image.open(io.BytesIO(thumbnail))
    _save(load_lora(options.source, Terminal("load")), options, picture)


def _save(lora, options: argparse.Namespace, picture=None) -> None:
    from .lora.files import save_lora
    from .lora.sketch import sketch, sketch_text

    saved = save_lora(lora, options.target, Terminal("save"), stored=options.stored, keep=options.keep, picture=picture,
                      sketch=sketch_text(sketch(lora)))
    print(f"{saved.path}  {saved.text}")


def export_parser():
    parser = argparse.ArgumentParser(
        prog="hywu lora export", description="Write a LoRA file as a PEFT folder, which peft loads onto HunyuanImage-3.")
    parser.add_argument("source", type=Path, help="LoRA file")
    parser.add_argument("target", type=Path, help="new folder")
    return parser, _export


def _export(options: argparse.Namespace) -> None:
    from .lora.files import load_lora
    from .lora.peft import export_peft

    folder = export_peft(load_lora(options.source, Terminal("load")), options.target, Terminal("export"))
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{folder}  {size / 1e6:.1f} MB")


def import_parser():
    parser = argparse.ArgumentParser(
        prog="hywu lora import", description="Write a PEFT folder as a LoRA file. Projections that it does not adapt are zero "
                                             "and smaller ranks padded with zeros; --keep 0.9999 leaves out experts that are "
                                             "zero.")
    parser.add_argument("source", type=Path, help="PEFT folder (adapter_config.json, adapter_model.safetensors)")
    parser.add_argument("target", type=Path, help="LoRA file to write (.safetensors)")
    parser.add_argument("--model", type=Path, help="backbone folder, where it is of another size than the published one")
    _form_options(parser)
    return parser, _import


def _import(options: argparse.Namespace) -> None:
    from .config import BackboneConfig
    from .lora.peft_import import import_peft
    from .lora.targets import adapted

    _check_new(options.target)
    sizes = None if options.model is None else adapted(BackboneConfig.from_folder(options.model))
    _save(import_peft(options.source, sizes, Terminal("import")), options)


def extract_parser():
    parser = argparse.ArgumentParser(
        prog="hywu lora extract", description="Write the difference of two checkpoints as a LoRA: the best approximation of "
                                              "that rank. Says how much of the difference it leaves.")
    parser.add_argument("base", type=Path, help="backbone folder, published bf16")
    parser.add_argument("tuned", type=Path, help="backbone folder of the same architecture")
    parser.add_argument("-o", "--output", dest="target", type=Path, required=True, help="LoRA file to write (.safetensors)")
    parser.add_argument("--rank", type=int, default=16, help="(default: 16)")
    parser.add_argument("--device", default="cpu", help="torch device that computes; a GPU is faster (default: cpu)")
    _form_options(parser)
    return parser, _extract


def _extract(options: argparse.Namespace) -> None:
    from .lora.extract import extract_lora

    _check_new(options.target)
    found = extract_lora(options.base, options.tuned, options.rank, device=options.device, on_tick=Terminal("extract"))
    _save(found.lora, options)
    print(f"relative error of the difference {found.error:.3%} at rank {options.rank}")
    if found.others:
        print(f"{len(found.others)} tensors that no LoRA of HY-WU adapts differ, too, and are not in it: "
              f"{', '.join(found.others[:5])}")


def _check_new(path: Path) -> None:
    """Refuse a name that the file cannot have, before minutes of work. Raises RequestError, LoRAError."""
    from .lora.aside import check_folder

    if path.suffix != ".safetensors" or "\0" in str(path) or path.is_dir():
        raise RequestError(f"{str(path)!r} is no name for a LoRA file: give a name that ends in .safetensors")
    check_folder(path.absolute())


# Command -> its parser, as in ``cli.main``.
LORA_PARSERS = {"save-as": save_as_parser, "export": export_parser, "import": import_parser, "extract": extract_parser}

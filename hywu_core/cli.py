"""``hywu``: edit a photo, think aloud, look into a checkpoint or LoRA, make a checkpoint smaller, train or serve
one, from a terminal.

Owns arguments and exit codes: 0 done, 1 refused (one line says why and what to do), 2 wrong arguments,
130 interrupted. The work itself is ``edit.py``'s and ``describe.py``'s.
"""

import argparse
import os
import sys
from pathlib import Path

from .cli_cluster import BUNDLED, serve_parser, status_parser
from .cli_lora import LORA_PARSERS
from .cli_map import map_parser
from .errors import HYWUError, RequestError
from .picture_file import check_picture, check_place, save_picture
from .terminal import Terminal

PLANNED_THINKING = 1000  # tokens; what the published pipeline's texts have
COMMANDS = ("edit", "think", "inspect", "plan", "convert", "lora", "map", "train", "serve", "status")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    name, commands = "hywu", COMMANDS
    parsers = {"edit": _edit_parser, "think": _think_parser, "inspect": _inspect_parser, "plan": _plan_parser,
               "convert": _convert_parser, "map": map_parser, "train": _train_parser, "serve": serve_parser,
               "status": status_parser}
    if arguments[:1] == ["lora"]:
        name, commands, parsers, arguments = "hywu lora", tuple(LORA_PARSERS), LORA_PARSERS, arguments[1:]
    if not arguments or arguments[0] not in parsers:
        wants_help = bool(arguments) and arguments[0] in ("-h", "--help")
        print(f"usage: {name} {{{','.join(commands)}}} ...   ({name} COMMAND --help says more)",
              file=sys.stdout if wants_help else sys.stderr)
        return 0 if wants_help else 2
    parser, run = parsers[arguments[0]]()
    # Intermixed, so that an option may stand between the pictures and the instruction.
    options = parser.parse_intermixed_args(arguments[1:])
    if getattr(options, "pictures", None) == [] and os.path.isfile(options.instruction):
        parser.error(f"{options.instruction} is a file and the only argument: say what is to be done with it")
    try:
        run(options)
    except HYWUError as error:
        print(f"hywu: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nhywu: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever read our output has gone (`hywu inspect ... | head`); keep Python from complaining when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # A name that is too long, a folder that may not be looked into: wherever a path was first touched.
        print(f"hywu: {error}: check that the path is right and may be used", file=sys.stderr)
        return 1
    return 0


def _model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, default=BUNDLED / "backbone", help="backbone folder (default: the bundled one)")
    parser.add_argument("--device", default="auto", help="auto: spread over GPUs and memory by a plan, as `hywu plan` does, "
                                                         "or a torch device for everything (default: auto)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="what to compute in (default: float32 on the CPU, else the checkpoint's)")
    parser.add_argument("--cluster", metavar="ADDRESS", help="use the model that `hywu serve` has brought up there, instead of "
                                                             "--model, --generator, --device and --dtype")
    parser.add_argument("--seed", type=int, default=0)


def _edit_parser():
    parser = argparse.ArgumentParser(prog="hywu edit", description="Edit photos as told; without a photo, paint from text.")
    parser.add_argument("pictures", nargs="*", type=Path, help="up to three source pictures, in the order you speak of them")
    parser.add_argument("instruction")
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture file to write (.png, .jpg, .webp)")
    _model_options(parser)
    parser.add_argument("--generator", type=Path, default=BUNDLED / "generator",
                        help="generator folder (default: the bundled one)")
    parser.add_argument("--lora", type=Path, help="use this saved LoRA, no generator is loaded")
    parser.add_argument("--no-lora", action="store_true", help="the plain backbone's picture")
    parser.add_argument("--save-lora", type=Path, help="write the generated LoRA to this file")
    parser.add_argument("--strength", type=float, default=1.0, help="of the LoRA, -4 to 4 (default: 1)")
    parser.add_argument("--thinking", help="use this thinking text ('' for none) and do not think")
    parser.add_argument("--steps", type=int, help="denoise steps (default: the checkpoint's)")
    parser.add_argument("--guidance", type=float, help="(default: the checkpoint's)")
    parser.add_argument("--shift", type=float, help="of the noise schedule (default: the checkpoint's)")
    parser.add_argument("--size", default="auto", help="auto, HEIGHTxWIDTH or WIDTH:HEIGHT (default: auto)")
    return parser, _edit


def _edit(options: argparse.Namespace) -> None:
    check_picture(options.output)
    if options.save_lora:
        if options.lora or options.no_lora:
            raise RequestError("--save-lora saves the LoRA that a generator writes, but --lora and --no-lora load none: "
                               "leave one of them out")
        if options.save_lora.suffix != ".safetensors":
            raise RequestError(f"--save-lora {options.save_lora}: LoRA files are found by their ending; give a name that ends "
                               "in .safetensors")
        check_place(options.save_lora)
    from .edit import edit
    from .generator.handle import load_generator
    from .lora.attach import inject
    from .lora.files import load_lora, save_lora
    from .lora.sketch import sketch, sketch_text
    from .vision.pictures import load_picture

    pictures = [load_picture(path) for path in options.pictures]
    model, plan = _load_model(options, None if options.lora or options.no_lora else options.generator)
    generator = None
    if options.lora:
        model = inject(model, load_lora(options.lora), options.strength)
    elif options.cluster and not options.no_lora:
        generator = _client(options).generator()
    elif not options.no_lora:
        where = {"device": options.device}
        if plan is not None:
            where = {"device": plan.generator.device, "mode": plan.generator.mode, "kept": plan.generator.kept}
        generator = load_generator(
            options.generator, dtype=_dtype(options) or (plan.dtype if plan else None), on_tick=Terminal("generator"), **where)
    stages: list[Terminal] = []

    def on_stage(name: str) -> Terminal:
        if stages:
            stages[-1].close()
        stages.append(Terminal(name))
        return stages[-1]

    result = edit(
        model, generator, pictures, options.instruction, thinking=options.thinking, steps=options.steps,
        guidance=options.guidance, shift=options.shift, seed=options.seed, size=options.size, strength=options.strength,
        on_stage=on_stage)
    save_picture(result.picture, options.output)
    print(f"{options.output}  {result.picture.width} x {result.picture.height}")
    if result.thinking:
        print(f"thinking: {result.thinking}")
    if options.save_lora and result.lora is not None:
        save_lora(result.lora, options.save_lora, picture=result.picture, sketch=sketch_text(sketch(result.lora)))
        print(f"{options.save_lora}  {result.lora.num_values} values, rank {result.lora.rank}")


def _think_parser():
    parser = argparse.ArgumentParser(prog="hywu think", description="Print what the backbone thinks of an instruction.")
    parser.add_argument("pictures", nargs="*", type=Path)
    parser.add_argument("instruction")
    _model_options(parser)
    parser.add_argument("--mode", default="think_recaption", choices=("think_recaption", "think", "recaption"))
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--temperature", type=float, help="0 takes the likeliest word each time (default: the checkpoint's)")
    return parser, _think


def _think(options: argparse.Namespace) -> None:
    from .think import think
    from .vision.pictures import load_picture

    pictures = [load_picture(path) for path in options.pictures]
    terminal = Terminal("think")
    text = think(
        _load_model(options)[0], pictures, options.instruction, seed=options.seed, mode=options.mode,
        max_new_tokens=options.max_new_tokens, temperature=options.temperature, on_tick=terminal)
    terminal.close()
    print(text)


def _inspect_parser():
    parser = argparse.ArgumentParser(
        prog="hywu inspect", description="Sizes, dtypes, targets and fingerprints of a checkpoint folder or LoRA file.")
    parser.add_argument("path", type=Path)
    return parser, _inspect


def _inspect(options: argparse.Namespace) -> None:
    from .describe import describe

    print(describe(options.path))


def _plan_parser():
    parser = argparse.ArgumentParser(
        prog="hywu plan", description="What would lie where, how much memory each device would need and how long an edit "
                                      "would take. Needs no weights, only a checkpoint's config.json: plan before downloading.")
    parser.add_argument("checkpoint", type=Path, help="backbone folder, or its config.json alone")
    parser.add_argument("--devices", help="a machine, e.g. 2x24+192ram, 4x80, 1x4090+64ram, 24,48, 24:12 (12 GiB free), "
                                          "cpu+24ram (default: this one)")
    parser.add_argument("--generator", type=Path, help="generator folder, or its config.json alone (default: plan without one)")
    parser.add_argument("--format", default="auto", choices=("auto", "bf16", "fp8", "int8", "int4"),
                        help="of the layers (default: auto)")
    parser.add_argument("--streaming", default="disk", choices=("none", "ram", "disk"),
                        help="how far away layers may wait for their turn (default: disk)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="what to compute in")
    parser.add_argument("--size", default="1024x1024", help="HEIGHTxWIDTH or WIDTH:HEIGHT (default: 1024x1024)")
    parser.add_argument("--pictures", type=int, default=1, help="source pictures (default: 1)")
    parser.add_argument("--steps", type=int, help="denoise steps (default: the checkpoint's)")
    parser.add_argument("--guidance", type=float, help="1 needs one row instead of two (default: the checkpoint's)")
    parser.add_argument("--thinking", type=int, default=PLANNED_THINKING,
                        help=f"tokens that it will think, 0 for none (default: {PLANNED_THINKING})")
    return parser, _plan


def _plan(options: argparse.Namespace) -> None:
    from .generator.sizes import generator_sizes
    from .placement.devices import find_devices, parse_devices
    from .placement.plan import plan
    from .placement.request import within_positions
    from .placement.table import describe
    from .placement.wanted import request_for, sizes_for

    devices = find_devices() if options.devices is None else parse_devices(options.devices)
    sizes, generator = sizes_for(options.checkpoint, devices, None if options.dtype is None else _dtype(options)), None
    if options.generator is not None:
        config = _generator_config(options.generator)
        made_for, there = ((config.num_base_model_layers, config.input_dim),
                           (sizes.config.num_hidden_layers, sizes.config.hidden_size))
        if made_for != there:
            raise RequestError(f"{options.generator} writes for {made_for[0]} layers of width {made_for[1]}, "
                               f"{options.checkpoint} has {there[0]} of width {there[1]}: give the generator made for it")
        generator = generator_sizes(config, sizes.dtype)  # `hywu edit` loads both in one dtype
    request = request_for(options.checkpoint, sizes.config, size=options.size, pictures=options.pictures, steps=options.steps,
                          guidance=options.guidance, thinking=options.thinking)
    fitting = within_positions(sizes.config, request)
    if fitting.thinking < request.thinking:
        print(f"hywu: {request.thinking} tokens of thinking do not fit into the backbone's "
              f"{sizes.config.max_position_embeddings} positions, planned with {fitting.thinking}", file=sys.stderr)
    print(describe(plan(sizes, devices, fitting, format=options.format, generator=generator, streaming=options.streaming)))


def _generator_config(path: Path):
    from .config import GeneratorConfig
    from .json_fields import read_json

    return GeneratorConfig.from_folder(path) if path.is_dir() else GeneratorConfig.from_dict(read_json(path))


def _convert_parser():
    parser = argparse.ArgumentParser(
        prog="hywu convert", description="Write a smaller copy of a backbone folder, its projections quantised. Run the same "
                                         "line again to go on where a stopped run was.")
    parser.add_argument("source", type=Path, help="published backbone folder")
    parser.add_argument("target", type=Path, help="new folder")
    parser.add_argument("--format", required=True, choices=("fp8", "int8", "int4"),
                        help="fp8 and int8 halve bf16, int8 with a third of the error; int4 leaves 28 %%")
    parser.add_argument("--device", default="cpu", help="torch device that quantises; a GPU is faster (default: cpu)")
    return parser, _convert


def _convert(options: argparse.Namespace) -> None:
    from .checkpoint.convert import convert

    manifest = convert(options.source, options.target, options.format, Terminal("convert"), device=options.device)
    errors, size = manifest["weight_error"].values(), sum(file["bytes"] for file in manifest["files"].values())
    print(f"{options.target}  {options.format}, {size / 1e9:.2f} GB, {len(errors)} weights quantised, relative error "
          f"{sum(errors) / len(errors):.2%} on average, {max(errors):.2%} at most")


def _train_parser():
    parser = argparse.ArgumentParser(
        prog="hywu train", description="Train a small HY-WU on a folder of photos. Run the same line again to go on where a "
                                       "killed run stopped.")
    parser.add_argument("recipe", help="a shipped recipe (mini, smoke) or a .json file with what differs from mini")
    parser.add_argument("--photos", type=Path, required=True, help="folder of pictures, searched to its depth")
    parser.add_argument("--run", type=Path, required=True, help="folder for states, log and samples; the checkpoint ends up in "
                                                                "its folder 'checkpoint'")
    parser.add_argument("--seed", type=int, help="of everything that is drawn (default: the recipe's)")
    parser.add_argument("--device", default="cpu", help="torch device to train on (default: cpu)")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast: faster where the hardware has it")
    return parser, _train


def _train(options: argparse.Namespace) -> None:
    from dataclasses import replace

    from .training.recipe import Recipe
    from .training.run import train

    recipe = Recipe.load(options.recipe)
    if options.seed is not None:
        recipe = replace(recipe, seed=options.seed)
    out = train(recipe, options.photos, options.run, device=options.device, autocast=options.autocast, on_stage=Terminal,
                on_log=lambda line: print(line, file=sys.stderr, flush=True))
    print(out)


def _load_model(options: argparse.Namespace, generator: Path | None = None):
    """The backbone, and the plan that it was loaded by (None for a cluster, or a device that was asked for)."""
    if options.cluster:
        return _client(options).model(), None
    from .handle import load_model

    if options.device != "auto":
        return load_model(options.model, device=options.device, dtype=_dtype(options), on_tick=Terminal("backbone")), None
    from .config import BackboneConfig
    from .generator.sizes import generator_sizes
    from .placement.devices import find_devices
    from .placement.plan import plan
    from .placement.request import within_positions
    from .placement.table import describe
    from .placement.wanted import request_for, sizes_for

    BackboneConfig.from_folder(options.model)  # a folder: planning would do with less
    devices = find_devices()
    sizes = sizes_for(options.model, devices, _dtype(options))
    request = request_for(options.model, sizes.config, size=_planned_size(options), pictures=len(options.pictures),
                          steps=getattr(options, "steps", None), guidance=getattr(options, "guidance", None),
                          thinking=PLANNED_THINKING)
    found = plan(sizes, devices, within_positions(sizes.config, request),
                 generator=None if generator is None else generator_sizes(_generator_config(generator), sizes.dtype))
    if len(devices) > 1 or found.streamed:
        print(describe(found), file=sys.stderr)
    return load_model(options.model, plan=found, on_tick=Terminal("backbone")), found


def _client(options: argparse.Namespace):
    from .cluster.client import client_of

    return client_of(options.cluster, lambda text: print(f"hywu: {text}", file=sys.stderr, flush=True))


def _planned_size(options: argparse.Namespace) -> str:
    """What to plan for: the size that is asked for, else a square, which no other shape of the table exceeds by much."""
    size = getattr(options, "size", "auto")
    return "1:1" if size.strip() == "auto" else size


def _dtype(options: argparse.Namespace):
    import torch

    if options.dtype:
        return getattr(torch, options.dtype)
    return torch.float32 if getattr(options, "device", None) == "cpu" else None


if __name__ == "__main__":
    sys.exit(main())

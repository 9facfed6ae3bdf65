"""``hywu map``: the LoRA files of a folder as a map, a picture in which like ones are near each other.

Owns the command's arguments; the map is ``lora/map.py``'s. Other commands are ``cli.py``'s.
"""

import argparse
from pathlib import Path

from .errors import RequestError
from .picture_file import save_picture
from .terminal import Terminal


def map_parser():
    parser = argparse.ArgumentParser(
        prog="hywu map", description="Draw the LoRA files below a folder as points, near each other where their updates "
                                     "are alike.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True, help="picture file to write (.png)")
    parser.add_argument("--filter", default="", help="only LoRAs whose instruction or name holds all of these words")
    return parser, _map


def _map(options: argparse.Namespace) -> None:
    if not options.folder.is_dir():
        raise RequestError(f"{options.folder} is no folder: give the folder that the LoRA files lie in")
    if options.output.suffix.lower() != ".png" or not options.output.absolute().parent.is_dir():
        raise RequestError(f"{options.output} cannot be written: name a .png file in a folder that is there")
    from .lora.map import lora_map, map_report, points_of_files
    from .lora.map_picture import map_picture
    from .lora.peft_config import WEIGHTS

    files = {path.relative_to(options.folder).as_posix(): path for path in sorted(options.folder.rglob("*.safetensors"))
             if path.name != WEIGHTS}  # a PEFT folder's, which is imported as a whole
    points, left_out = points_of_files(files, options.filter, Terminal("map"))
    found = lora_map(points)
    save_picture(map_picture(found), options.output)
    print(map_report(found, left_out))

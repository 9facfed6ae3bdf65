"""What one edit asks for, as far as memory and time depend on it, and how many tokens that makes.

Owns the sizes of a request and the lengths of its sequences (spec sections 5 and 11). Knows no bytes and no devices.
"""

from dataclasses import dataclass, replace

from ..config import BackboneConfig
from ..errors import PlacementError
from ..vision.buckets import Buckets

# The published system prompt (en_unified, 5,673 characters); other prompts are shorter.
SYSTEM_TOKENS = 1200
INSTRUCTION_TOKENS = 64
# Start token, role names, line breaks and tags around the texts of one row.
FRAME_TOKENS = 16
# <boi> <size> <ratio> <timestep> ... <joint_img_sep> ... <eoi>
PICTURE_TOKENS = 6
MAX_PICTURES = 3


@dataclass(frozen=True)
class Request:
    """One edit. size: as the sampler takes it, the nearest bucket counts. rows: 2 under guidance, 1 without it or distilled.

    thinking: tokens that it will think, 0 for none (the published pipeline's texts have about 1000).
    """

    size: str = "1024x1024"
    pictures: int = 1
    rows: int = 2
    steps: int = 50
    thinking: int = 1000
    text: int = SYSTEM_TOKENS + INSTRUCTION_TOKENS

    def __post_init__(self):
        for name, least, most in (("pictures", 0, MAX_PICTURES), ("rows", 1, 2), ("steps", 1, 1000), ("thinking", 0, 100_000)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise PlacementError(f"{value} {name} asked for, {least} to {most} can be planned")


@dataclass(frozen=True)
class Lengths:
    """Tokens of a request's sequences.

    prompt: what thinking starts from. thought: what it adds. condition: what the generator reads (S). whole: a row of the
    denoise sequence (L). canvas: what later steps recompute. shared: what both rows have in common, 0 for one row. cells: of
    the picture's latent. height, width: its pixels.
    """

    prompt: int
    thought: int
    condition: int
    whole: int
    canvas: int
    shared: int
    cells: int
    height: int
    width: int


def lengths(config: BackboneConfig, request: Request) -> Lengths:
    """The lengths of a request; sources are as large as the picture that is made of them.

    Raises: PlacementError for more tokens than the backbone has positions; RequestError for a size that is none.
    """
    bucket = Buckets.of(config).parse(request.size)
    cells = bucket.grid[0] * bucket.grid[1]
    pictures = request.pictures * (cells + config.vit_max_num_patches + PICTURE_TOKENS)
    prompt = request.text + FRAME_TOKENS + pictures
    condition = prompt + request.thinking
    canvas = cells + 1 + config.cfg_distilled + config.use_meanflow
    # <boi> <size> <ratio> before it; <eoi> </answer> and a line break behind it.
    whole = condition + canvas + 6
    if whole > config.max_position_embeddings:
        raise PlacementError(f"{request.pictures} pictures, {request.thinking} tokens of thinking and {request.size} make "
                             f"{whole} tokens, the backbone has {config.max_position_embeddings} positions: ask for less")
    # The rows differ from the instruction on, which stands behind the pictures.
    shared = request.text - min(INSTRUCTION_TOKENS, request.text) + pictures if request.rows == 2 else 0
    return Lengths(prompt, request.thinking, condition, whole, canvas, shared, cells, bucket.height, bucket.width)


def within_positions(config: BackboneConfig, request: Request) -> Request:
    """The request with no more text and thinking than the backbone has positions for; small ones have few.

    Raises: as ``lengths``, if it does not fit without any.
    """
    room = config.max_position_embeddings - lengths(config, replace(request, text=0, thinking=0)).whole
    text = min(request.text, room)
    return replace(request, text=text, thinking=min(request.thinking, room - text))

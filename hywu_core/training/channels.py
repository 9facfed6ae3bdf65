"""Which channel of the small backbone's residual stream means what.

Owns the map and the view of an attention's heads; ``copier.py`` and ``places.py`` write weights by it.
"""

import torch

LATENT_UNIT = 3.0  # latent / 3 has a standard deviation of about 1
COPY_LAYER = 2
LATENTS = 64
QUARTER = LATENTS // 4  # a cell's quarters have the same channels, one after the other
ORIGINAL, COPY, CONSTANT = slice(0, 64), slice(64, 128), 128
# One channel for every distance from the top, the bottom, the left and the right border: 0 and 1, then 2 and 3, then 4 to 7.
FLAGS, LATENT_MARK, SEEN, FAR = slice(129, 137), 137, slice(138, 146), slice(146, 162)
PAINTED_MARK = 162  # a latent cell of the painted picture: its timestep is not 0
SECOND_MARK = 163  # anything behind an <eoi>: no cell of the first source picture
END_MARK, BEGIN_MARK = 164, 165  # of <eoi> and <|startoftext|>
FLAG = 4.0
RATIO_MARK, SIZE_MARK = 166, 167  # of <img_ratio_i> and <img_size> tokens
RATIO_CODE = slice(168, 179)
# On latent cells the first of these hold squares: how much there is of what, each with its channels within a quarter of a cell
# (``linear_vae``) and their mean square in free photos. Brightness, red against blue, green, coarse and fine structure.
SQUARES = (((0,), 6.2), ((1,), 1.9), ((2,), 0.8), ((3, 4), 1.0), ((8, 10, 12, 14), 0.4))
SQUARE_UNITS = 2 * 4 * sum(len(channels) for channels, _ in SQUARES)
RESERVED = slice(CONSTANT, RATIO_CODE.stop)  # nothing but what is written here may touch these
WORKSPACE = RESERVED.stop  # from here on the language may write; everything below belongs to pictures
LEVEL = 120.0  # of the constant channel
PAIR = 24.0  # of the constant pairs at t = 1, in latent units: large, so that the norm hardly sees the picture
GAIN, BIAS = 4.0, 12.0  # put the last SiLU's input into 6..18, where it is the identity
SKILL, SKILL_SIGNS = 5.0, {-2: -1.0, -1: 1.0}  # layer from the end -> its units take away or add
ALWAYS = 3.0  # of values that never change, for the constant part of an edit's LoRA to read
# Behind the copy layer nobody needs to know places any more: there FAR says what the first and the second picture are like,
# each by the means of its squares and of brightness, red against blue, and green (with the gain that makes them about one).
LIKE, MEANS = 8, (0.4, 0.7, 1.1)
# How large the queries and keys are that picture copying rests on: their norm takes it away, an edit's LoRA cannot.
FIRM = 8.0
SLOW = (12, 13, 14, 15)  # rotary frequencies that hardly turn within a sequence


def heads(attention) -> tuple[torch.Tensor, torch.Tensor]:
    """Views: qkv_proj as (kv head, its queries then key then value, Q, D) and o_proj as (D, kv head, query, Q)."""
    kv, group, q = attention.kv_heads, attention.group, attention.head_dim
    rows = attention.qkv_proj.weight.view(kv, group + 2, q, -1)
    return rows, attention.o_proj.weight.view(-1, kv, group, q)

"""What a run needs besides weights: hidden states, the widest intermediate results, keys and values. In bytes.

Owns one formula for each step of an edit, read off the code that does it; ``tests/placement/test_replay.py`` runs that code on
``meta`` and counts. Two steps never happen at once, so the plan takes the largest on each device.

Counted as the fused kernels of a GPU work: attention without its matrix, a mask turned into numbers once a pass. A backend that
builds more than that (torch's plain attention under a mask) is not foreseen.
"""

from ...kernels.padding import aligned
from .request import Lengths
from .sizes import RANK, GeneratorSizes, ModelSizes

# Tokens whose expert work is done at once (``kernels/experts.py``), and what a plan may lower it to where memory is short.
EXPERT_TOKENS = (16_384, 8_192, 4_096, 2_048)
FIRST_SLOTS = 256  # of a thinking cache beyond its prompt, ``think.py``


def kv_layer(sizes: ModelSizes, rows: int, slots: int) -> int:
    """Keys and values of one layer."""
    config = sizes.config
    return 2 * rows * slots * config.num_key_value_heads * config.attention_head_dim * sizes.dtype.itemsize


def thinking_kv(sizes: ModelSizes, lengths: Lengths) -> tuple[int, int]:
    """Of one layer: while the prompt is read, and at most while tokens come (the old buffers live until the new ones are
    full)."""
    first = kv_layer(sizes, 1, lengths.prompt + FIRST_SLOTS)
    slots, most = lengths.prompt + FIRST_SLOTS, first
    while slots < lengths.prompt + lengths.thought:
        # All keys grow first, then all values: old keys are gone when the last of the new values comes.
        most = max(most, kv_layer(sizes, 1, slots) // 2 + kv_layer(sizes, 1, 2 * slots))
        slots *= 2
    return first, most


def layer(
    sizes: ModelSizes, rows: int, length: int, keys: int, expert_tokens: int, *, lora: bool, masked: bool, composed: bool
) -> int:
    """The most that one decoder layer holds besides its input: in attention or in the experts.

    masked: with a mask (length, keys) as numbers. composed: without the fused kernel between the experts' products (the CPU).
    """
    config, item, tokens = sizes.config, sizes.dtype.itemsize, rows * length
    state = config.hidden_size * item
    within = max(_attention(sizes, tokens, lora), 3 * tokens * state + _experts(sizes, tokens, expert_tokens, lora, composed))
    return within + (length * keys * item if masked else 0)


def _attention(sizes: ModelSizes, tokens: int, lora: bool) -> int:
    config, item = sizes.config, sizes.dtype.itemsize
    queries = config.num_attention_heads * config.attention_head_dim
    kv = config.num_key_value_heads * config.attention_head_dim
    projected = (config.hidden_size + queries + 2 * kv + (RANK if lora else 0)) * item  # the norm's output and q, k, v
    turned = queries + kv
    # Rotating: twice in fp32 and once rounded. Attending: queries and keys, normed and with their weights, or the result.
    rotating = tokens * (projected + turned * (8 + item))
    attending = tokens * (projected + 2 * turned * item)
    return max(rotating, attending)


def _experts(sizes: ModelSizes, tokens: int, at_once: int, lora: bool, composed: bool) -> int:
    config, item = sizes.config, sizes.dtype.itemsize
    top_k, inner, rank = max(config.moe_topk), max(config.moe_intermediate_size), RANK if lora else 0
    piece = min(tokens, at_once)
    first = 2 * inner + 2 * rank
    if lora:
        middle = first + aligned(inner + rank, sizes.dtype) + (inner if composed else 0)
        behind = max(aligned(inner + rank, sizes.dtype) + config.hidden_size, 2 * config.hidden_size)
    else:
        middle, behind = first + 2 * inner, inner + 2 * config.hidden_size
    wide = max(config.hidden_size + first, middle, behind)
    # Where each pair goes (two int64) and the router's choice; results of the full pieces before the last full one.
    choice = piece * top_k * 16 + tokens * top_k * 12
    earlier = (max(1, tokens // piece) - 1) * piece * config.hidden_size * item
    return piece * top_k * wide * item + choice + earlier


def sight(sizes: ModelSizes, keys: int, queries: int, length: int) -> int:
    """Rotary tables of ``length`` tokens and a bool mask (queries, keys)."""
    return length * sizes.config.attention_head_dim * 8 + queries * keys


def states(sizes: ModelSizes, tokens: int) -> int:
    """Hidden states of as many tokens."""
    return tokens * sizes.config.hidden_size * sizes.dtype.itemsize


def source_tokens(sizes: ModelSizes, pictures: int, lengths: Lengths) -> int:
    """Encoded source pictures: they travel with the condition."""
    return states(sizes, pictures * (lengths.cells + sizes.config.vit_max_num_patches))


def embedding(sizes: ModelSizes, lengths: Lengths) -> int:
    """The patch embedder on one latent."""
    inner = sizes.config.patch_embed_hidden_dim * sizes.dtype.itemsize
    return lengths.cells * (4 * sizes.config.hidden_size * sizes.dtype.itemsize + inner)


def velocity(sizes: ModelSizes, rows: int, lengths: Lengths) -> int:
    """The final layer on the picture's tokens, these included."""
    return 3 * states(sizes, rows * lengths.cells)


def vae(sizes: ModelSizes, lengths: Lengths) -> int:
    """Encoding or decoding: five results of the outermost level, which has all pixels, all frames and the least channels."""
    config = sizes.config.vae
    values = config.block_out_channels[0] * config.ffactor_temporal * lengths.height * lengths.width
    return 5 * values * sizes.dtype.itemsize + 3 * lengths.height * lengths.width * sizes.dtype.itemsize


def vision(sizes: ModelSizes) -> int:
    """The tower on one picture: its patches through the widest layer, and the aligner's result twice."""
    vit, item = sizes.config.vit, sizes.dtype.itemsize
    widths = 4 * vit["hidden_size"] + 2 * vit.get("intermediate_size", 4 * vit["hidden_size"])
    return sizes.config.vit_max_num_patches * (widths + sizes.config.hidden_size) * item


def writing(generator: GeneratorSizes, condition: int) -> int:
    """The generator on a condition of so many tokens: its own tokens, one slice of a block, what is attended to, positions."""
    state = generator.width * generator.itemsize
    within = max(1, generator.at_once // generator.row) * generator.row
    piece = min(generator.tokens, within)
    block = 12 * piece * state + 2 * condition * state
    tables = (generator.tokens + generator.row + condition) * generator.head_dim * 4
    # The condition as it came, projected and normed; at the end the tokens and what is read off them.
    done = generator.tokens * state + generator.written
    return max(generator.tokens * state + block, done) + 3 * condition * state + tables


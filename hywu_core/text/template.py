"""Sections laid out as one token sequence, with the place of every picture in it (spec sections 2, 5 and 6).

Owns ``Sequence`` and the two builders: ``text_sequence`` for what the backbone continues with text, ``image_sequence`` for what
it continues with a picture (under guidance with a second, unconditional row). Embeds nothing and knows no masks, only spans.
"""

from collections.abc import Sequence as Many
from dataclasses import dataclass, field

import torch

from ..config import BackboneConfig, GenerationConfig
from ..errors import PromptError
from ..vision.buckets import Bucket, Buckets
from .sections import TEMPLATES, CanvasSection, Picture, PictureSection, Section, TextSection, image_turns, text_turns
from .tokenizer import BOI, BOS, CFG, EOI, GUIDANCE, IMG, JOINT_SEPARATOR, THINKING_TAGS, TIMESTEP, TIMESTEP_R, Tokenizer

Slice = tuple[int, int]  # half-open


@dataclass(frozen=True)
class ImageSpan:
    """The ``<img>`` tokens of one picture: [start, stop) and the grid (rows, cols) that its rope positions lie on.

    kind: "vae" and "vit" are the two views of source picture number ``picture``; "gen" is the painted one (``picture`` None).
    A "vit" span holds max_num_patches tokens, more than its grid has cells: the rest is padding with text positions.
    """

    kind: str
    start: int
    stop: int
    grid: tuple[int, int]
    picture: int | None = None


@dataclass(frozen=True, eq=False)
class Sequence:
    """One prompt as tokens.

    ids_BL: (rows, L) int64, rows [conditional] or [conditional, unconditional]; all rows have the same geometry.
    images: every picture span in order. cond_timestep: place of each source picture's ``<timestep>``. gen_timestep, guidance,
    gen_timestep_r: places of the painted picture's embedded tokens, None where the sequence has none.
    sections: what the tokens came from, with the slice of each; for pictures the slice from ``<boi>`` to ``<eoi>``.
    """

    ids_BL: torch.Tensor
    images: tuple[ImageSpan, ...] = ()
    cond_timestep: tuple[int, ...] = ()
    gen_timestep: int | None = None
    guidance: int | None = None
    gen_timestep_r: int | None = None
    sections: tuple[tuple[Section, Slice], ...] = field(default=(), repr=False)

    @property
    def length(self) -> int:
        """L, the tokens of one row."""
        return self.ids_BL.shape[1]

    def spans(self, kind: str) -> tuple[ImageSpan, ...]:
        """The spans of one kind, in picture order."""
        return tuple(span for span in self.images if span.kind == kind)

    @property
    def gen(self) -> ImageSpan | None:
        """The painted picture."""
        return next(iter(self.spans("gen")), None)

    @property
    def joint_spans(self) -> tuple[Slice, ...]:
        """Per source picture: from its first latent token to its last vision token, separator and padding included."""
        return tuple((vae.start, vit.stop) for vae, vit in zip(self.spans("vae"), self.spans("vit"), strict=True))

    def full_spans(self, attention_type: str) -> list[Slice]:
        """The spans inside which every token attends to every other (spec section 6)."""
        if attention_type == "joint_full":
            spans = list(self.joint_spans)
        else:
            kinds = {"full": ("vae", "vit"), "full_causal": ("vae",), "causal": ()}[attention_type]
            spans = [(span.start, span.stop) for span in self.images if span.kind in kinds]
        return spans + [(span.start, span.stop) for span in self.spans("gen")]

    def rope_spans(self, attention_type: str) -> list[tuple[Slice, tuple[int, int]]]:
        """((start, stop), (rows, cols)) of the spans whose positions lie on a grid (spec section 2)."""
        everything = ("vae", "vit", "gen")
        kinds = {"joint_full": everything, "full": everything, "full_causal": ("vae",), "causal": ()}[attention_type]
        return [((span.start, span.stop), span.grid) for span in self.images if span.kind in kinds]

    @property
    def shared_prefix(self) -> int:
        """How many of the first tokens all rows have in common, cut before a picture that does not lie in there whole."""
        if self.ids_BL.shape[0] == 1:
            return 0
        differs_L = (self.ids_BL != self.ids_BL[:1]).any(0)
        shared = int(differs_L.int().argmax()) if differs_L.any() else self.length
        cut = [start for start, stop in (*self.joint_spans, *((image.start, image.stop) for image in self.images))
               if start < shared < stop]
        return min([shared, *cut] if self.gen is None else [shared, self.gen_timestep, *cut])

    @property
    def later_slice(self) -> Slice | None:
        """What later denoise steps recompute: from the painted ``<timestep>`` to its last ``<img>`` (spec section 6)."""
        return None if self.gen is None else (self.gen_timestep, self.gen.stop)


def text_sequence(tokenizer: Tokenizer, config: BackboneConfig, generation: GenerationConfig, prompt: str,
                  pictures: Many[Picture], *, thinking: str = "", bot_task: str = "think", system_prompt: str | None = None,
                  drop_think: bool | None = None) -> Sequence:
    """The one-row sequence that the backbone continues with text (spec section 5).

    bot_task: "think" (also "think_recaption"), "recaption", "img_ratio", "auto" or "image"; decides how the answer opens.
    thinking: what the assistant has thought already, "" for nothing. system_prompt: the selected text, None for none.
    drop_think: leave the thought out and keep the recaption; None takes the checkpoint's setting.

    Raises:
        PromptError: an empty instruction, structure tokens inside the texts, or more tokens than generation.max_length, for
            "img_ratio" with the smallest picture that the answer can be.
    """
    _check_texts(tokenizer, prompt, thinking)
    task = "think" if bot_task == "think_recaption" else bot_task
    sections = text_turns(
        TEMPLATES[generation.sequence_template], task, tokenizer.img_size, prompt, pictures, thinking, system_prompt,
        generation.drop_think if drop_think is None else drop_think)
    # Without room for a picture behind it there is no use in asking for its ratio: the end of a long run would be an error.
    reserve = _smallest_picture(config) if task == "img_ratio" else 0
    return _lay_out(tokenizer, config, generation.max_length, sections, rows=1, reserve=reserve)


def image_sequence(tokenizer: Tokenizer, config: BackboneConfig, generation: GenerationConfig, prompt: str,
                   pictures: Many[Picture], bucket: Bucket, *, thinking: str = "", system_prompt: str | None = None,
                   drop_think: bool | None = None, rows: int | None = None) -> Sequence:
    """The sequence that ends in a picture of the size ``bucket`` (spec section 5).

    rows: 2 adds the unconditional row, in which instruction and thinking are ``<cfg>`` tokens and everything else stays; None
    means 1 for a checkpoint whose guidance is distilled into a token, else 2. The other arguments are those of text_sequence.

    Raises:
        PromptError: as in text_sequence.
    """
    _check_texts(tokenizer, prompt, thinking)
    sections = image_turns(
        TEMPLATES[generation.sequence_template], prompt, pictures, bucket, thinking, system_prompt,
        generation.drop_think if drop_think is None else drop_think)
    if rows is None:
        rows = 1 if config.cfg_distilled else 2
    return _lay_out(tokenizer, config, generation.max_length, sections, rows)


def _check_texts(tokenizer: Tokenizer, prompt: str, thinking: str) -> None:
    if not prompt.strip():
        raise PromptError("the instruction is empty: say what is to be done with the picture")
    for what, text, allowed in (("instruction", prompt, ()), ("thinking text", thinking, THINKING_TAGS)):
        # Bytes that are no UTF-8 reach us from a terminal as lone surrogates, which no tokenizer takes.
        if bad := [character for character in text if "\ud800" <= character <= "\udfff"]:
            raise PromptError(f"the {what} holds {len(bad)} characters that are no text (the first is {bad[0]!a}), 0 are "
                              "allowed: type it again, as UTF-8")
        # Without a "<" there is no special token; this saves tokenising the usual text twice.
        if "<" not in text:
            continue
        inside = [tokenizer.structure[number] for number in tokenizer.encode(text) if number in tokenizer.structure]
        if refused := [token for token in inside if token not in allowed]:
            raise PromptError(
                f"the {what} contains {refused[0]}, which is no text but a token that marks the structure of the sequence"
                f" ({len(refused)} such tokens in all, 0 are allowed): remove it or write it with spaces")


class _Layout:
    """The rows of a sequence while they grow, all by the same number of tokens."""

    def __init__(self, tokenizer: Tokenizer, config: BackboneConfig, rows: int):
        self.tokenizer = tokenizer
        self.config = config
        self.rows: list[list[int]] = [[tokenizer.id(BOS)] for _ in range(rows)]
        self.images: list[ImageSpan] = []
        self.cond_timestep: list[int] = []
        self.embedded: dict[str, int] = {}

    @property
    def length(self) -> int:
        return len(self.rows[0])

    def put(self, token: str, count: int = 1) -> int:
        """Append a token ``count`` times to all rows; returns where the first one stands."""
        start = self.length
        for row in self.rows:
            row += [self.tokenizer.id(token)] * count
        return start

    def text(self, section: TextSection) -> None:
        ids = self.tokenizer.encode(section.text)
        blank = [self.tokenizer.id(CFG)] * len(ids)
        for number, row in enumerate(self.rows):
            row += blank if section.content and number == 1 else ids

    def image(self, kind: str, count: int, grid: tuple[int, int], picture: int | None = None) -> None:
        start = self.put(IMG, count)
        self.images.append(ImageSpan(kind, start, start + count, grid, picture))

    def open_picture(self, bucket: Bucket) -> int:
        """``<boi>``, the two size tokens and ``<timestep>``; returns where the ``<timestep>`` stands."""
        self.put(BOI)
        self.put(self.tokenizer.img_size)
        self.put(f"<img_ratio_{bucket.index}>")
        return self.put(TIMESTEP)

    def cells(self, bucket: Bucket) -> tuple[int, int]:
        """The token grid (rows, cols) of a bucket: one token per latent cell."""
        return bucket.height // self.config.vae.ffactor_spatial, bucket.width // self.config.vae.ffactor_spatial

    def source(self, section: PictureSection) -> None:
        self.cond_timestep.append(self.open_picture(section.bucket))
        rows, cols = self.cells(section.bucket)
        self.image("vae", rows * cols, (rows, cols), section.index)
        self.put(JOINT_SEPARATOR)
        self.image("vit", self.config.vit_max_num_patches, section.grid, section.index)
        self.put(EOI)

    def canvas(self, section: CanvasSection) -> None:
        self.embedded["gen_timestep"] = self.open_picture(section.bucket)
        if self.config.cfg_distilled:
            self.embedded["guidance"] = self.put(GUIDANCE)
        if self.config.use_meanflow:
            self.embedded["gen_timestep_r"] = self.put(TIMESTEP_R)
        rows, cols = self.cells(section.bucket)
        self.image("gen", rows * cols, (rows, cols))
        self.put(EOI)


def _smallest_picture(config: BackboneConfig) -> int:
    """Tokens of the smallest picture."""
    pixels = min(bucket.height * bucket.width for bucket in Buckets.of(config).entries)
    return pixels // config.vae.ffactor_spatial**2


def _lay_out(tokenizer: Tokenizer, config: BackboneConfig, max_length: int, sections: list[Section], rows: int,
             reserve: int = 0) -> Sequence:
    layout = _Layout(tokenizer, config, rows)
    places = []
    for section in sections:
        start = layout.length
        if isinstance(section, TextSection):
            layout.text(section)
        elif isinstance(section, PictureSection):
            layout.source(section)
        else:
            layout.canvas(section)
        places.append((section, (start, layout.length)))
    needed = layout.length + reserve
    if needed > max_length:
        content = sum(stop - start for section, (start, stop) in places if isinstance(section, TextSection) and section.content)
        raise PromptError(
            f"the sequence needs {needed} tokens, {content} of them instruction and thinking, but this checkpoint allows "
            f"{max_length} (max_length): shorten the text by {needed - max_length} tokens or use fewer pictures")
    return Sequence(
        ids_BL=torch.tensor(layout.rows, dtype=torch.int64),
        images=tuple(layout.images),
        cond_timestep=tuple(layout.cond_timestep),
        sections=tuple(places),
        **layout.embedded,
    )

"""The backbone's tokenizer: text <-> ids, and the ids of the tokens that give a sequence its structure.

Owns reading ``tokenizer.json`` (through the ``tokenizers`` library, so that transformers need not be imported) and the check
that it belongs to the backbone. How sequences are built from ids is in ``template.py``.
"""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import BackboneConfig
from ..errors import CheckpointError
from ..json_fields import read_text

if TYPE_CHECKING:
    import tokenizers

RATIO_COUNT = 37  # 33 buckets of the walk and 4 extras (spec section 8)

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BOI, EOI, IMG, JOINT_SEPARATOR = "<boi>", "<eoi>", "<img>", "<joint_img_sep>"
TIMESTEP, TIMESTEP_R, GUIDANCE, CFG = "<timestep>", "<timestep_r>", "<guidance>", "<cfg>"
THINK, END_THINK = "<think>", "</think>"
RECAPTION, END_RECAPTION = "<recaption>", "</recaption>"
ANSWER, END_ANSWER = "<answer>", "</answer>"

# The tags that thinking text is written with; a user may type and edit them there.
THINKING_TAGS = (THINK, END_THINK, RECAPTION, END_RECAPTION, ANSWER, END_ANSWER)
_REQUIRED = (BOS, EOS, BOI, EOI, IMG, JOINT_SEPARATOR, TIMESTEP, CFG, *THINKING_TAGS)
# Tokens that stand for something else than text in other parts of the vocabulary; not every tokenizer has them.
_OPTIONAL = (TIMESTEP_R, GUIDANCE, "<pad>", "<boa>", "<eoa>", "<bov>", "<eov>", "<audio>", "<video>")


class _DamagedFile:
    """Turns what the Rust side raises for a file it cannot parse (bare Exception, no subclass) into a CheckpointError."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        if kind is Exception:
            raise CheckpointError(f"{self.path} is not a tokenizer ({error}): download it again") from None


class Tokenizer:
    """Text to ids and back, plus the named special ids of one backbone (spec section 5)."""

    def __init__(self, core: "tokenizers.Tokenizer", config: BackboneConfig, where: str = "tokenizer.json"):
        """Raises CheckpointError if a structure token is missing or the ids contradict the backbone's configuration."""
        self._core = core
        self._where = where
        self.img_size = f"<img_size_{config.image_base_size}>"
        # Published tokenizer files may carry truncation or padding settings; both would break the geometry of a sequence.
        core.no_truncation()
        core.no_padding()
        core.encode_special_tokens = False
        for token, wanted in config.special_ids.items():
            found = core.token_to_id(token)
            if found != wanted:
                raise CheckpointError(
                    f"{where} has id {found} for {token}, but config.json says {wanted}: this tokenizer belongs to another "
                    "backbone; take the tokenizer.json that was published with these weights")
        needed = [*_REQUIRED, self.img_size, *(f"<img_ratio_{index}>" for index in range(RATIO_COUNT))]
        if config.cfg_distilled:
            needed.append(GUIDANCE)
        if config.use_meanflow:
            needed.append(TIMESTEP_R)
        missing = [token for token in needed if core.token_to_id(token) is None]
        if missing:
            raise CheckpointError(
                f"{where} lacks {len(missing)} of the {len(needed)} special tokens that this backbone needs: "
                f"{', '.join(missing[:10])}; take the tokenizer.json that was published with these weights")
        highest = max(core.get_vocab(with_added_tokens=True).values())
        if highest >= config.vocab_size:
            raise CheckpointError(
                f"{where} has ids up to {highest}, but config.json has a vocab_size of {config.vocab_size}: "
                "this tokenizer belongs to another backbone")

    @classmethod
    def from_folder(cls, folder: Path, config: BackboneConfig) -> "Tokenizer":
        """Read ``folder/tokenizer.json``.

        Raises:
            CheckpointError: the file is missing or damaged, or belongs to another backbone.
        """
        import tokenizers

        path = Path(folder) / "tokenizer.json"
        text = read_text(path)
        with _DamagedFile(path):
            core = tokenizers.Tokenizer.from_str(text)
        return cls(core, config, str(path))

    def id(self, token: str) -> int:
        """The id of one token that stands in the vocabulary.

        Raises:
            CheckpointError: there is no such token.
        """
        found = self._core.token_to_id(token)
        if found is None:
            raise CheckpointError(
                f"{self._where} has no token {token}: take the tokenizer.json that was published with these weights")
        return found

    @cached_property
    def ratio_ids(self) -> tuple[int, ...]:
        """The ids of the 37 size ratios in bucket order; they are not consecutive in the published vocabulary."""
        return tuple(self.id(f"<img_ratio_{index}>") for index in range(RATIO_COUNT))

    @cached_property
    def structure(self) -> dict[int, str]:
        """id -> name of every token that only the template may place: no user text may hold one."""
        names = [*_REQUIRED, *_OPTIONAL, *(token for token in self._core.get_vocab() if token.startswith("<img_"))]
        return {number: name for name in names if (number := self._core.token_to_id(name)) is not None}

    def encode(self, text: str) -> list[int]:
        """The ids of one section of text; special tokens written out in it become those tokens. No BOS or EOS is added."""
        return self._core.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of some ids, special tokens written out."""
        return self._core.decode(list(ids), skip_special_tokens=False)

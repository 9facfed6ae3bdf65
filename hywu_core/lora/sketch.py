"""A LoRA's update as a short vector: inner products of sketches estimate inner products of updates.

The update U = s·B·A of a matrix is projected from both sides by random signs, P = S_o U S_iᵀ / K with S_o (K, O) and
S_i (K, I), which takes (S_o B)(A S_iᵀ) only, and the K² numbers of every update are added into LENGTH places, each with a
random place and sign (Charikar, Chen, Farach-Colton 2002). Both steps keep inner products in the mean. With c the cosine of two
updates and p_g the product of their norms in layer and target g, as a share of that of the whole norms, the error has a
standard deviation of at most

    ‖U‖ ‖V‖ sqrt((1 + c²) / LENGTH + 4/K (1 + 1/K) Σ_g p_g²)

to first order: 0.07 of the product of the norms for a LoRA of the published sizes. ``error_limit`` computes it.

All signs come from PCG64's raw output under a seed made of names and sizes, so a sketch in a file stays comparable whatever the
versions of torch and numpy. Sketches are comparable between LoRAs of the same targets.
"""

import base64
import binascii
import hashlib
import math

import numpy as np
import torch

from ..config import LoRATarget
from ..errors import LoRAError
from ..progress import Tick, silent
from .spectrum import Spectra
from .value import LoRA

LENGTH = 1024  # a power of two up to 2^15: a place and its sign are one 16-bit number
K = 16  # rows of the projections
VERSION = "1"
_BYTES = 4 + 2 * LENGTH  # in a file: the largest magnitude in fp32, then the values as parts of it in fp16


def sketch(lora: LoRA, on_tick: Tick = silent, salt: int = 0) -> torch.Tensor:
    """(LENGTH,) fp32 of a LoRA's update, all factors in it. Ticks per target of each layer; holds one target at a time.

    salt: other salts give other, independent sketches; those of different salts must not be compared.
    """
    total = np.zeros(LENGTH)
    done, scale_R = 0, lora.scale_R.float()
    for layer in range(lora.num_layers):
        for target in lora.targets:
            path = f"{lora.prefix}{layer}.{target.name}"
            small = _projected(lora.tensors[f"{path}.lora_A"], lora.tensors[f"{path}.lora_B"], scale_R,
                               *_signs(target, layer, salt))
            total += _added(small, _bits(f"places {_seed(target, layer)}", salt, 2 * small.size).view("<u2"))
            done += 1
            on_tick(done, lora.num_layers * len(lora.targets), None)
    return torch.from_numpy(total.astype(np.float32))


def error_limit(one: Spectra, two: Spectra, cosine: float) -> float:
    """The standard deviation of the estimate of two LoRAs' inner product, at most, as a share of the product of their norms."""
    shares = one.norms() * two.norms() / (one.norm * two.norm)
    return math.sqrt((1 + cosine**2) / LENGTH + 4 / K * (1 + 1 / K) * float(shares.square().sum()))


def sketch_text(values: torch.Tensor) -> str:
    """A sketch as text for a file's metadata, in half precision of its largest magnitude: about 2.7 KB.

    Raises:
        LoRAError: it has not LENGTH finite values.
    """
    if values.shape != (LENGTH,) or not torch.isfinite(values).all():
        raise LoRAError(f"a sketch of shape {tuple(values.shape)} cannot be stored, expected {LENGTH} finite values: the LoRA "
                        "holds NaN or Inf, generate it again")
    largest = np.float32(float(values.abs().max()))
    parts = values.numpy() / (largest or 1)
    raw = np.array(largest, "<f4").tobytes() + parts.astype("<f2").tobytes()
    return f"{VERSION}:{base64.b64encode(raw).decode()}"


def sketch_of_text(text: str) -> torch.Tensor:
    """(LENGTH,) fp32 from what ``sketch_text`` wrote; nothing in a file is trusted.

    Raises:
        LoRAError: another version, another length, or values that are not finite.
    """
    version, _, body = text[: 2 * _BYTES].partition(":")
    try:
        raw = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if version != VERSION or len(raw) != _BYTES:
        raise LoRAError(f"a stored sketch is version {version[:10]!r} of {len(raw)} bytes, expected {VERSION!r} of {_BYTES}: "
                        "save the LoRA again")
    with np.errstate(invalid="ignore"):  # Inf times 0; found below
        values = np.frombuffer(raw, "<f2", offset=4).astype(np.float32) * np.frombuffer(raw, "<f4", count=1)[0]
    if not np.isfinite(values).all():
        raise LoRAError(f"a stored sketch holds NaN or Inf in {int((~np.isfinite(values)).sum())} of {LENGTH} values, expected "
                        "none: save the LoRA again")
    return torch.from_numpy(values)


def _projected(
    a: torch.Tensor, b: torch.Tensor, scale_R: torch.Tensor, out_KO: torch.Tensor, in_KI: torch.Tensor,
) -> np.ndarray:
    """(K · K,) or (E · K · K,) fp64: S_o B diag(s) A S_iᵀ / K; expert by expert, their matrices are large."""
    pairs = [(a, b)] if a.ndim == 2 else zip(a, b, strict=True)
    small = [(out_KO @ b_OR.float() * scale_R) @ (a_RI.float() @ in_KI.T) for a_RI, b_OR in pairs]
    return torch.stack(small).double().div(K).flatten().numpy()


def _added(small: np.ndarray, random: np.ndarray) -> np.ndarray:
    """Every number into its place, with its sign: (LENGTH,) fp64."""
    signs = np.where(random & LENGTH, -1.0, 1.0)
    return np.bincount(random & (LENGTH - 1), small * signs, LENGTH)


def _seed(target: LoRATarget, layer: int) -> str:
    return f"{target.name} {layer} {target.out_features} {target.in_features} {target.experts}"


def _signs(target: LoRATarget, layer: int, salt: int) -> tuple[torch.Tensor, torch.Tensor]:
    """S_o (K, O) and S_i (K, I) of ±1, the same for all experts of a target."""
    sides = []
    for side, width in (("out", target.out_features), ("in", target.in_features)):
        raw = _bits(f"{side} {_seed(target, layer)}", salt, -(-K * width // 8))
        bits = np.unpackbits(raw, count=K * width, bitorder="little")
        sides.append(torch.from_numpy(bits).view(K, width).float().mul_(2).sub_(1))
    return sides[0], sides[1]


def _bits(name: str, salt: int, nbytes: int) -> np.ndarray:
    """Random bytes that only the name and the salt decide: numpy promises PCG64's raw output, not what it makes of it."""
    seed = hashlib.sha256(f"hywu sketch {VERSION} {salt} {name}".encode()).digest()
    raw = np.random.PCG64(int.from_bytes(seed, "little")).random_raw(-(-nbytes // 8))
    return raw.astype("<u8").view(np.uint8)[:nbytes]

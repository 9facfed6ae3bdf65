"""Comparing one stage with its golden: every check is kept, the worst one is what the stage reports."""

import math
from dataclasses import dataclass, field

import torch

# Tolerances of spec/golden-format.md, as (relative to max|ref|, absolute).
MODULE = (1e-5, 1e-6)
END_TO_END = (1e-4, 0.0)


@dataclass
class Checks:
    """The checks of one stage."""

    stage: str
    failures: list[str] = field(default_factory=list)
    count: int = 0
    worst: float = 0.0  # largest |error| / max|ref| of the real-valued checks
    tolerance: float = 0.0  # the relative tolerance of that check; 0 = exact
    errors: dict[str, float] = field(default_factory=dict)  # label -> ‖error‖ / ‖ref‖ of the real-valued checks

    def exact(self, label: str, got, want) -> None:
        """Equal values: numbers, strings, lists, or tensors of any dtype (shape included)."""
        self.count += 1
        if isinstance(want, torch.Tensor) or isinstance(got, torch.Tensor):
            got, want = torch.as_tensor(got), torch.as_tensor(want)
            if got.shape != want.shape:
                self.failures.append(f"{label}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            elif not torch.equal(got.to(want.dtype), want):
                wrong = int((got.to(want.dtype) != want).sum())
                self.failures.append(f"{label}: {wrong} of {want.numel()} values differ")
        elif got != want:
            self.failures.append(f"{label}: {got!r}, expected {want!r}")

    def close(self, label: str, got: torch.Tensor, want: torch.Tensor, tolerance: tuple[float, float] = MODULE) -> None:
        """|got - want| <= relative * max|want| + absolute, NaN only where the golden has NaN."""
        self.count += 1
        if got.shape != want.shape:
            self.failures.append(f"{label}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            return
        got, want = got.detach().double(), want.double()
        if not torch.equal(got.isnan(), want.isnan()):
            self.failures.append(f"{label}: NaN in other places than the golden")
            return
        got, want = got.nan_to_num(0.0), want.nan_to_num(0.0)
        scale = want.abs().max().item() if want.numel() else 0.0
        error = (got - want).abs().max().item() if want.numel() else 0.0
        relative, absolute = tolerance
        ratio = error / scale if scale else error
        self.errors[label] = ((got - want).norm() / want.norm()).item() if scale else error
        if ratio > self.worst or self.tolerance == 0.0:
            self.worst, self.tolerance = max(self.worst, ratio), relative
        if not error <= relative * scale + absolute or not math.isfinite(error):
            self.failures.append(f"{label}: |error| {error:.3e}, max|ref| {scale:.3e}, tolerance {relative:g}")

    def pixels(self, label: str, got: torch.Tensor, want: torch.Tensor) -> None:
        """uint8 pictures: at most 1 apart, on less than 1 % of the values."""
        self.count += 1
        if got.shape != want.shape:
            self.failures.append(f"{label}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
            return
        difference = (got.int() - want.int()).abs()
        share = (difference > 0).double().mean().item()
        if difference.max().item() > 1 or share >= 0.01:
            self.failures.append(f"{label}: worst {difference.max().item()} of 255, {share:.2%} of the values differ")

    def line(self) -> str:
        """The one line that the parity command prints."""
        verdict = "pass" if not self.failures and self.count else "FAIL"
        tolerance = f"{self.tolerance:.0e}" if self.tolerance else "exact"
        return f"{self.stage:22s} worst {self.worst:.2e}  tolerance {tolerance:5s}  checks {self.count:4d}  {verdict}"

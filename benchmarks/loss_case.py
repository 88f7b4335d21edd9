"""One case of the loss benchmark: its inputs, and their gradients in float64.

It needs NumPy and base.errors alone, because workers of other environments import it too.
"""

import concurrent.futures
import dataclasses
import os
import pathlib
import re
import time

import numpy as np

from base.errors import UserError

# Where training ends: the published B/16 has t = 117 and b = -12.9, and its pairs a cosine of 0.13.
T, B, POSITIVE_COSINE = 117.0, -12.9, 0.13

LARGEST_REFERENCE = 2**17  # pairs; more take hours and all memory in float64
BLOCK_ROWS = 256

GRADIENTS = ("zimg", "ztxt", "t", "b")


@dataclasses.dataclass(frozen=True)
class LossCase:
    """D devices with n pairs of width d each; `dtype` is that of embeddings and gradients."""

    devices: int
    n: int
    d: int
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.devices}x{self.n}x{self.d}"

    @property
    def pairs(self) -> int:
        """N, the rows of the global batch."""
        return self.devices * self.n


def parse(text: str, dtype: str) -> LossCase:
    """'4x1024x512': devices, pairs on each, width."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
    sizes = [int(size) for size in match.groups()] if match else [0]
    if min(sizes) < 1:
        raise UserError(f"--cases: {text!r} is not DEVICESxPAIRSxWIDTH, such as 4x1024x512")
    return LossCase(*sizes, dtype=dtype)


def write_inputs(case: LossCase, folder: pathlib.Path, seed: int = 0) -> None:
    """zimg.npy and ztxt.npy: float32 [N, d] in `folder`, unit rows that `case.dtype` can hold."""
    rng = np.random.default_rng(seed)
    step = max(1, 2**24 // case.d)
    zimg, ztxt = (
        np.lib.format.open_memmap(
            folder / f"{name}.npy", mode="w+", dtype=np.float32, shape=(case.pairs, case.d)
        )
        for name in ("zimg", "ztxt")
    )
    for start in range(0, case.pairs, step):
        rows = min(step, case.pairs - start)
        x, other = (rng.standard_normal((rows, case.d), dtype=np.float32) for _ in range(2))
        x = _unit(x)
        other = _unit(other - np.sum(other * x, axis=1, keepdims=True) * x)
        y = POSITIVE_COSINE * x + np.float32(np.sqrt(1 - POSITIVE_COSINE**2)) * other
        zimg[start : start + rows] = round_to(x, case.dtype)
        ztxt[start : start + rows] = round_to(y, case.dtype)
    zimg.flush()
    ztxt.flush()


def read_rows(folder: pathlib.Path, name: str, start: int = 0, stop: int | None = None):
    """Rows of what `write_inputs` or `write_reference` wrote; no other row is read."""
    return np.array(np.load(folder / f"{name}.npy", mmap_mode="r")[start:stop])


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 x, rounded to the nearest even value of `dtype`."""
    if dtype == "float32":
        return x
    bits = x.astype(np.float32).view(np.uint32)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return bits.view(np.float32)


def write_reference(case: LossCase, folder: pathlib.Path, limit_s: float) -> str:
    """The loss and its gradients of the inputs in `folder`, in float64 by blocks of rows.

    They become `reference_<name>.npy` in `folder`. The definition is siglip.losses.sigmoid_loss.

    Returns:
      The reason if there is none, such as more than `limit_s` seconds by the first blocks; else "".
    """
    if case.pairs > LARGEST_REFERENCE:
        return f"a float64 reference of {case.pairs:,} x {case.pairs:,} logits is out of reach"
    zimg, y = (read_rows(folder, name).astype(np.float64) for name in ("zimg", "ztxt"))
    starts = range(0, case.pairs, BLOCK_ROWS)
    lanes = min(os.cpu_count() or 1, len(starts))
    dx, dy_of = np.empty_like(y), [np.zeros_like(y) for _ in range(lanes)]
    sums_of = np.zeros((lanes, 3))  # of loss, dt and db, each times N

    def block(lane: int, start: int) -> None:
        x = zimg[start : start + BLOCK_ROWS]
        cosines = x @ y.T
        logits = T * cosines + B
        shrunk = np.exp(-np.abs(logits))
        g = np.where(logits >= 0, 1.0, shrunk) / (1 + shrunk)
        nll = np.maximum(logits, 0).sum() + np.log1p(shrunk).sum()
        own = np.arange(len(x))
        nll -= logits[own, start + own].sum()  # softplus(-l) = softplus(l) - l
        g[own, start + own] -= 1
        dx[start : start + BLOCK_ROWS] = g @ y
        dy_of[lane] += g.T @ x
        sums_of[lane] += nll, np.vdot(g, cosines), g.sum()

    begin = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(lanes) as pool:
        for i in range(0, len(starts), lanes):
            list(pool.map(block, range(lanes), starts[i : i + lanes]))
            expected = (time.monotonic() - begin) / (i + lanes) * len(starts)
            if i == 0 and expected > limit_s:
                return f"a float64 reference would take about {expected:.0f} s"
    for dy in dy_of[1:]:
        dy_of[0] += dy
    loss, dt, db = sums_of.sum(0) / case.pairs
    scale = T / case.pairs
    values = {"zimg": dx * scale, "ztxt": dy_of[0] * scale, "t": dt, "b": db, "loss": loss}
    for name, value in values.items():
        np.save(folder / f"reference_{name}.npy", value)
    return ""


def has_reference(folder: pathlib.Path) -> bool:
    return (folder / "reference_loss.npy").exists()


def squares(
    folder: pathlib.Path, name: str, got: np.ndarray | float, start: int = 0
) -> tuple[float, float]:
    """Sums of squares of (got - reference) and of the reference, of rows `start` and up."""
    got = np.asarray(got, np.float64)
    if got.ndim == 0:
        want = np.load(folder / f"reference_{name}.npy")
    else:
        want = read_rows(folder, f"reference_{name}", start, start + len(got))
    return float(np.sum((got - want) ** 2)), float(np.sum(want**2))


def relative_error(parts: list[tuple[float, float]]) -> float:
    """L2 norm of the error over that of the reference, from `squares` of all rows."""
    return float(np.sqrt(sum(p[0] for p in parts) / sum(p[1] for p in parts)))


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)

"""Three exchanges that bring the rows of all devices to each device, and the choice among them.

Each device has a block of rows that stays and one that travels. `tour` shows every device the
travelling blocks of all, and brings home what was gathered for them on the way. All three
exchanges are exact; they differ in what is sent when, and in memory:

  ring           one block a step to the next device, its accumulator a step behind. O(n) memory.
  bidirectional  half a block each way: on a torus, whose links run both ways at once, half the
                 time on the wires. O(n) memory.
  gather         one all-gather, one visit, one reduce-scatter: two messages instead of 2 D - 1,
                 for when n is so small that the ring would only wait. O(N) memory.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh

EXCHANGES = ("ring", "bidirectional", "gather")

# visit(carry, block, own) -> (carry, gathered): `block` is a pytree of arrays with equally many
# rows, `own` says that it is this device's, and `gathered` has a row for each row of it.
Visit = Callable[[Any, Any, bool], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Exchange:
    """An exchange over some axes of a mesh, used inside `shard_map`. Static.

    Attributes:
      name: one of EXCHANGES.
      axes: mesh axes that rows are sharded over, in order.
      order: positions along these axes, in the order of the ring (cycle.ring_order).
      unroll: steps per iteration of the loop round the ring.
    """

    name: str
    axes: tuple[str, ...]
    order: tuple[int, ...]
    unroll: int = 1

    @property
    def devices(self) -> int:
        return len(self.order)

    def tour(
        self, visit: Visit, carry: Any, block: Any, *, combine: Callable = jnp.add
    ) -> tuple[Any, Any]:
        """Calls visit(carry, block, own) for the blocks of all devices, the own one first.

        `combine` joins what different devices gathered for a row (jnp.add, jnp.logaddexp).

        Returns:
          carry after the last visit, and what all devices gathered for the rows of `block`.
        """
        if self.devices == 1:
            return visit(carry, block, True)
        rows = len(jax.tree.leaves(block)[0])
        match self.name:
            case "gather":
                return self._gather(visit, carry, block, combine)
            case "bidirectional" if rows > 1:
                return self._rings(visit, carry, block, combine, cuts=[rows // 2], ways=(1, -1))
        return self._rings(visit, carry, block, combine, cuts=[], ways=(1,))

    def _rings(self, visit: Visit, carry, block, combine, *, cuts: list[int], ways):
        """Cuts every block at `cuts`; part i travels ways[i] devices a step."""

        def split(tree):
            parts = [jnp.split(x, cuts) for x in jax.tree.leaves(tree)]
            return [jax.tree.unflatten(jax.tree.structure(tree), p) for p in zip(*parts)] or [
                tree for _ in ways
            ]

        def hop(parts):
            return [self._hop(part, way) for part, way in zip(parts, ways)]

        # Each hop is issued before the matmuls that hide it.
        parts = split(block)
        arriving = hop(parts)
        carry, gathered = visit(carry, block, True)

        def step(state, last: bool = False):
            carry, parts, accumulators = state
            arriving = parts if last else hop(parts)  # the last blocks have nowhere left to go
            accumulators = hop(accumulators)
            for i, part in enumerate(parts):
                carry, gathered = visit(carry, part, False)
                accumulators[i] = jax.tree.map(combine, accumulators[i], gathered)
            return carry, arriving, accumulators

        state = (carry, arriving, split(gathered))
        if (between := self.devices - 2) > 0:
            loop = functools.partial(lax.scan, length=between, unroll=min(self.unroll, between))
            state, _ = loop(lambda state, _: (step(state), None), state)
        carry, _, accumulators = step(state, last=True)
        accumulators = hop(accumulators)  # the D-th hop: each one is where its rows are
        return carry, jax.tree.map(lambda *parts: jnp.concatenate(parts), *accumulators)

    def _hop(self, tree, way: int):
        pairs = [(i, self.order[(k + way) % self.devices]) for k, i in enumerate(self.order)]
        return jax.tree.map(lambda x: lax.ppermute(x, self.axes, pairs), tree)

    def _gather(self, visit: Visit, carry, block, combine):
        rows = len(jax.tree.leaves(block)[0])
        first = lax.axis_index(self.axes) * rows

        def others(x):  # rolled, so that the own rows come first and can be left out
            everyone = lax.all_gather(x, self.axes, tiled=True)
            return jnp.roll(everyone, -first, axis=0)[rows:]

        arriving = jax.tree.map(others, block)
        carry, own = visit(carry, block, True)
        carry, rest = visit(carry, arriving, False)

        def return_to_owners(own, rest):
            everyone = jnp.roll(jnp.concatenate([own, rest]), first, axis=0)
            if combine is jnp.add:
                return lax.psum_scatter(everyone, self.axes, tiled=True)
            by_device = everyone.reshape(self.devices, rows, *everyone.shape[1:])
            received = lax.all_to_all(by_device, self.axes, 0, 0)
            return functools.reduce(combine, received)

        return carry, jax.tree.map(return_to_owners, own, rest)


# The choice of an exchange

# Device kind (its beginning) -> dense matmul FLOP/s in bf16, bytes/s of a link in one direction,
# seconds before the first byte of a message arrives, whether the links form a torus. Vendors'
# figures; the latencies are estimates, and a small TPU slice may lack the torus' last link.
DEVICE_KINDS = {
    "TPU v4": (275e12, 45e9, 2e-6, True),
    "TPU v5 lite": (197e12, 45e9, 2e-6, True),
    "TPU v5": (459e12, 90e9, 2e-6, True),
    "TPU v6": (918e12, 90e9, 2e-6, True),
    "NVIDIA A100": (312e12, 300e9, 2e-5, False),
    "NVIDIA H100": (989e12, 450e9, 2e-5, False),
    "NVIDIA H200": (989e12, 450e9, 2e-5, False),
    # Emulated devices share the cores and the memory of one machine, see docs/ring.md.
    "cpu": (60e9, 5e9, 5e-4, False),
}
UNKNOWN_DEVICE = (300e12, 50e9, 2e-5, False)
BETWEEN_GPU_HOSTS = (50e9, 5e-5)  # GPUs in several hosts: 400 Gb/s each
GATHER_BYTES = 2**28  # what `gather` may hold on a device


@dataclasses.dataclass(frozen=True)
class Choice:
    """The exchange chosen for a loss, with the estimates that decided it."""

    name: str
    seconds: dict[str, float]  # estimate for one loss with gradients, by exchange
    why: str


def choose(mesh: Mesh, *, n: int, d: int, devices: int, itemsize: int) -> Choice:
    """The exchange with the least estimated time for a loss with all gradients.

    Compute hides sends while a block is visited; what it does not hide, and the latency of each
    message, is waited for. `gather` hides nothing, but sends two messages only.

    Args:
      n, d: rows and width of a block. itemsize: bytes of a travelling number.
    """
    device = mesh.devices.flat[0]
    kind = next((k for k in DEVICE_KINDS if device.device_kind.startswith(k)), None)
    flops, wire, latency, torus = DEVICE_KINDS[kind] if kind else UNKNOWN_DEVICE
    if device.platform == "gpu" and len({x.process_index for x in mesh.devices.flat}) > 1:
        wire, latency = BETWEEN_GPU_HOSTS
    flops = flops / 4 if itemsize == 4 and device.platform != "cpu" else flops  # f32 in passes
    visit = 6 * n * n * d / flops
    block = n * d * (itemsize + 4) / wire  # embeddings and their float32 accumulator
    ways = 2 if torus else 1  # links that send at a time
    seconds = {
        "ring": devices * max(visit, block + 2 * latency),
        "bidirectional": devices * max(visit, (block + 4 * latency) / ways),
        "gather": devices * visit
        + (devices - 1) * block / ways
        + 2 * latency * math.ceil(math.log2(max(devices, 2))),
    }
    held = devices * n * d * (itemsize + 8)
    allowed = [k for k in EXCHANGES if k != "gather" or held <= GATHER_BYTES]
    name = min(allowed, key=lambda k: seconds[k])  # the ring where they are equal
    estimates = ", ".join(f"{k} {seconds[k] * 1e3:.3g} ms" for k in allowed)
    return Choice(name, seconds, f"{device.device_kind}, n={n}, d={d}, D={devices}: {estimates}")

"""The order of the ring: its neighbours are neighbours in the machine, and the loss is the same."""

import itertools
import math
import types

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from loss_inputs import inputs, mesh_of
from test_ring import assert_equals_definition, relative_error
from topologies import devices_of, slices

from siglip.losses import cycle, definitions, ring
from siglip.losses.exchange import Exchange
from siglip.losses.logit_stats import logit_stats
from siglip.losses.pairs import Pairs, labels
from siglip.sharding import make_mesh


def grid(*sides: int, seed: int = 0) -> list[cycle.Place]:
    """The places of a grid, shuffled."""
    places = [((0,), coords) for coords in itertools.product(*map(range, sides))]
    return [places[i] for i in np.random.default_rng(seed).permutation(len(places))]


def hops(places, order) -> list[int]:
    assert sorted(order) == list(range(len(places)))
    return [cycle.links(places[a], places[b]) for a, b in zip(order, (*order[1:], order[0]))]


@pytest.mark.parametrize("axes", [2, 3, 4])
def test_a_grid_with_an_even_side_has_a_cycle_of_neighbours_without_links_round_its_ends(axes):
    for sides in itertools.product((1, 2, 3, 4, 8), repeat=axes):
        if sum(side > 1 for side in sides) > 1 and 2 <= math.prod(sides) <= 512:
            places = grid(*sides)
            longest = max(hops(places, cycle.cycle(places)))
            # Where all sides are odd there is none: the last hop leads from end to end.
            assert longest == 1 if math.prod(sides) % 2 == 0 else longest > 1, sides


def test_a_line_has_no_hop_of_more_than_two_links():
    for size in range(2, 20):
        for sides in ((size,), (1, size, 1)):
            places = grid(*sides)
            assert max(hops(places, cycle.cycle(places))) == min(2, size - 1)


def test_places_with_gaps_are_a_grid_and_others_stay_in_order():
    spread = [((0,), (4 * x, 2 * y)) for (_, (x, y)) in grid(4, 2)]
    assert set(hops(spread, cycle.cycle(spread))) == {2, 4}
    missing = grid(4, 4)[1:]
    assert cycle.cycle(missing) == tuple(range(15))
    twice = [((0,), (0, 0))] * 4
    assert cycle.cycle(twice) == tuple(range(4))


def test_a_ring_goes_through_islands_one_after_the_other():
    islands = [((i % 3,), coords) for i, (_, coords) in enumerate(grid(4, 6))]
    assert hops(islands, cycle.cycle(islands)).count(1000) == 3
    slices_of_tpus = [((i,), coords) for i in range(2) for _, coords in grid(4, 4, seed=i)]
    lengths = hops(slices_of_tpus, cycle.cycle(slices_of_tpus))
    assert lengths.count(1000) == 2 and lengths.count(1) == 30


def gpu(i: int, process: int):
    return types.SimpleNamespace(id=i, process_index=process, platform="gpu", device_kind="H")


def fake_mesh(devices, **shape: int):
    array = np.array(devices, object).reshape(*shape.values())
    return types.SimpleNamespace(devices=array, axis_names=tuple(shape), shape=shape)


def test_devices_without_coordinates_keep_the_order_of_the_mesh_process_by_process():
    assert cycle.ring_order(mesh_of(4, 2), ("data", "fsdp")) == tuple(range(8))
    gpus = [gpu(i, i % 2) for i in range(6)]
    assert cycle.ring_order(fake_mesh(gpus, data=6), ("data",)) == (0, 2, 4, 1, 3, 5)  # type: ignore
    # Each of the three rings over `data` has one card of each host, whatever the order.
    hosts = [gpu(i, i // 3) for i in range(12)]
    mesh = fake_mesh(hosts, data=4, fsdp=3)
    assert cycle.ring_order(mesh, ("data",)) == (0, 1, 2, 3)  # type: ignore


@pytest.mark.parametrize("others, longest", [("crossed", 1), ("straight", 2)])
def test_rings_side_by_side_take_the_first_ones_cycle_unless_it_makes_the_others_longer(
    others, longest
):
    rings = {
        "crossed": [(0, 0), (1, 1), (1, 0), (0, 1)],
        "straight": [(0, 0), (1, 0), (1, 1), (0, 1)],
    }
    chips = [
        types.SimpleNamespace(process_index=0, coords=(x, y))
        for column in zip(rings["crossed"], rings[others], rings[others])
        for x, y in column
    ]
    mesh = fake_mesh(chips, data=4, fsdp=3)
    order = cycle.ring_order(mesh, ("data",))  # type: ignore
    lengths = [hops([cycle.find_place(chip) for chip in ring], order) for ring in mesh.devices.T]
    assert np.max(lengths) == longest
    assert lengths[1:] == [[1] * 4] * 2


@pytest.mark.parametrize("kind", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_every_permute_on_every_slice_of_tpus_goes_to_a_physical_neighbour(kind, monkeypatch):
    sent = []
    monkeypatch.setattr("jax.lax.ppermute", lambda x, axes, pairs: sent.extend(pairs))
    for name in slices():
        if name.startswith(f"{kind}:"):
            devices = devices_of(name)
            for fsdp in (1, 4, len(devices)):
                mesh = make_mesh(devices, fsdp=fsdp)
                axes = tuple(mesh.axis_names)
                ring_or_halves = Exchange("bidirectional", axes, cycle.ring_order(mesh, axes))
                places = np.array([(*d.coords, d.core_on_chip) for d in mesh.devices.flat])
                for way in (1, -1):
                    sent.clear()
                    ring_or_halves._hop([0], way)
                    sources, targets = np.array(sent).T
                    assert set(sources) == set(targets) == set(range(len(devices)))
                    assert (np.abs(places[sources] - places[targets]).sum(axis=1) == 1).all(), name


@pytest.mark.parametrize("axes", [("data",), ("fsdp",), ("fsdp", "data")])
def test_rings_over_some_axes_of_a_slice_have_shorter_hops_than_the_mesh(axes):
    for name in ("v4:4x4x4", "v5e:16x16", "tpu7x:4x4x4"):
        mesh = make_mesh(devices_of(name), fsdp=16)
        order = cycle.ring_order(mesh, axes)
        by_ring = np.moveaxis(mesh.devices, *{"data": (0, 0), "fsdp": (1, 0)}[axes[0]])
        longest = {}
        for kind, positions in (("cycle", order), ("mesh", range(len(order)))):
            rings = by_ring.reshape(len(order), -1).T
            rings = [[cycle.find_place(device) for device in one] for one in rings]
            longest[kind] = max(max(hops(one, tuple(positions))) for one in rings)
        assert longest["cycle"] <= (1 if len(axes) == 2 else 2) < longest["mesh"], name


# The losses, on emulated devices that say they lie in a grid, in an order unlike the mesh's


@pytest.fixture
def in_a_grid(monkeypatch):
    coords = [coords for _, coords in grid(2, 2, 2, seed=5)]
    monkeypatch.setattr(cycle, "find_place", lambda device: ((0,), coords[device.id]))
    mesh = Mesh(
        np.array(jax.devices())[[3, 1, 7, 0, 2, 6, 5, 4]].reshape(4, 2),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
    )
    order = cycle.ring_order(mesh, mesh.axis_names)
    assert order != tuple(range(8))
    assert set(hops([((0,), coords[d.id]) for d in mesh.devices.flat], order)) == {1}
    return mesh


@pytest.mark.parametrize("exchange", ["ring", "bidirectional", "gather"])
@pytest.mark.parametrize("axes", [(), ("data",), ("fsdp", "data")], ids=str)
def test_losses_equal_their_definition_in_any_order_of_the_ring(in_a_grid, exchange, axes):
    mask = np.random.default_rng(1).random(80) > 0.2
    args = inputs(80, 32, 117.0, -12.9)
    options = dict(mesh=in_a_grid, exchange=exchange, axes=axes, tile=7)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(*a, mask, **options),
        lambda *a: definitions.sigmoid_loss(*a, mask),
        args,
    )
    if axes == () and exchange == "ring":
        assert_equals_definition(
            lambda *a: ring.softmax_loss(*a, mask, **options),
            lambda *a: definitions.softmax_loss(*a, mask),
            args,
            1e-5,
        )


@pytest.mark.parametrize(
    "pairs",
    [Pairs("hard", 5, "ignore"), Pairs("random", 7), Pairs("random", 4, "positive")],
    ids=str,
)
@pytest.mark.parametrize("exchange", ["ring", "bidirectional"])
def test_selected_negatives_and_duplicates_are_the_same_in_any_order(in_a_grid, pairs, exchange):
    args = inputs(48, 16, 30.0, -5.0)
    ids = np.random.default_rng(2).integers(-1, 12, (48, 1)).astype(np.int32)
    z = labels(pairs, args[0], args[1], None, ids, seed=3)
    options = dict(mesh=in_a_grid, exchange=exchange, tile=5, pairs=pairs)
    assert_equals_definition(
        lambda *a: ring.sigmoid_loss(*a, None, ids, 3, **options),
        lambda *a: definitions.sigmoid_loss(*a, None, z),
        args,
        2e-6,
    )


@pytest.mark.parametrize("argnums", [(0, 2), (1, 3)])
def test_whichever_tower_travels_its_gradients_come_home_in_any_order(in_a_grid, argnums):
    args = inputs(48, 16, 30.0, -5.0)
    got = jax.jit(
        jax.grad(lambda *a: ring.sigmoid_loss(*a, mesh=in_a_grid, exchange="ring"), argnums)
    )(*args)
    want = jax.grad(definitions.sigmoid_loss, argnums)(*args)
    assert all(relative_error(g, w) < 1e-5 for g, w in zip(got, want))


def test_the_largest_negative_is_found_in_any_order_of_the_ring(in_a_grid):
    zimg, ztxt, t, b = inputs(48, 16, 10.0, -10.0)
    mask = np.arange(48) % 5 > 0
    got = logit_stats(zimg, ztxt, t, b, mask, mesh=in_a_grid)
    logits = np.asarray(t * zimg @ ztxt.T + b)
    negative = mask[:, None] & mask[None] & ~np.eye(48, dtype=bool)
    assert float(got["neg_logit_max"]) == pytest.approx(logits[negative].max(), rel=1e-5)

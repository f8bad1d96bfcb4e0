"""Collectives of known bytes by hand, over a node's links, its island's network and the links between islands."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_lm.scaling.collectives import all_gather, all_reduce, all_to_all, reduce_scatter, send
from moe_lm.scaling.hardware import Machine, machine

A100 = machine("a100-80")


def clean(**sheet) -> Machine:
    """Links of 100 and a network of 10 bytes/s in nodes of 8, all reached, a second and two of latency."""
    figures = {"nvlink": 100.0, "network": 10.0, "nvlink_latency": 1.0, "network_latency": 2.0} | sheet
    return Machine(dataclasses.replace(A100.sheet, **figures), A100.reached._replace(links=1.0, network=1.0))


def test_alone_costs_nothing():
    for collective in (all_gather, reduce_scatter, all_reduce, all_to_all):
        assert collective(clean(), 1e9, 1) == 0


def test_ring_inside_a_node():
    """Seven messages of an eighth of 800 bytes at 100 bytes/s, a second of latency each."""
    assert all_gather(clean(), 800, 8) == pytest.approx(7 * (1 + 1))
    assert reduce_scatter(clean(), 800, 8) == pytest.approx(14)
    assert all_reduce(clean(), 800, 8) == pytest.approx(28)


def test_ring_over_nodes_and_inside():
    """32 ranks in 4 nodes: 3 messages of 10 bytes over the network, then 7 of 40 over the links, at each rank."""
    assert all_gather(clean(), 320, 32) == pytest.approx(3 * (2 + 10 / 10) + 7 * (1 + 40 / 100))


def test_stride_puts_each_rank_in_a_node_of_its_own():
    assert all_gather(clean(), 400, 4, stride=8) == pytest.approx(3 * (2 + 100 / 10))
    assert all_gather(clean(), 400, 4, stride=4) == pytest.approx((2 + 100 / 10) + (1 + 200 / 100))


def test_islands_exchange_what_is_their_own():
    """4 nodes in 2 islands of 16 GPUs: 100 bytes come from the other island, then 200 from the other node."""
    islands = clean(island_gpus=16, weak_network=1.0)
    assert all_gather(islands, 400, 4, stride=8) == pytest.approx((2 + 100 / 1) + (2 + 200 / 10))
    assert all_gather(islands, 400, 2, stride=8) == all_gather(clean(), 400, 2, stride=8)


def test_all_to_all_is_as_slow_as_its_slowest_links():
    assert all_to_all(clean(), 800, 8) == pytest.approx(1 + 700 / 100)
    assert all_to_all(clean(), 1600, 16) == pytest.approx(2 + 800 / 10)
    assert all_to_all(clean(island_gpus=8, weak_network=1.0), 1600, 16) == pytest.approx(2 + 800 / 1)


def test_send():
    assert send(clean(), 300) == pytest.approx(1 + 3)
    assert send(clean(), 300, stride=8) == pytest.approx(2 + 30)
    assert send(clean(island_gpus=16, weak_network=1.0), 300, stride=16) == pytest.approx(2 + 300)


def test_bus_bandwidth_of_a_dgx():
    """An all-reduce of 1 GiB on 8 A100 has 235 GB/s (stas00/ml-engineering), on 8 H100 by a ring 367 (NCCL #1455)."""
    for name, measured in (("a100-80", 235e9), ("h100", 367e9)):
        seconds = all_reduce(machine(name), 2**30, 8)
        assert 2 * 7 / 8 * 2**30 / seconds == pytest.approx(measured, rel=0.1)


@given(
    st.sampled_from([all_gather, all_reduce, all_to_all]),
    st.floats(1, 1e12),
    st.integers(2, 4096),
    st.sampled_from([1, 2, 8, 64]),
    st.sampled_from(["nvlink", "network", "weak_network"]),
    st.floats(1, 10),
)
def test_faster_links_are_never_slower(collective, nbytes, ranks, stride, link, factor):
    sheet = dataclasses.replace(A100.sheet, island_gpus=1024, weak_network=6.25e9)
    faster = dataclasses.replace(sheet, **{link: factor * getattr(sheet, link)})
    before = collective(Machine(sheet, A100.reached), nbytes, ranks, stride)
    assert 0 < collective(Machine(faster, A100.reached), nbytes, ranks, stride) <= before


@given(st.floats(1, 1e12), st.floats(1, 10), st.integers(2, 4096))
def test_more_bytes_are_never_faster(nbytes, factor, ranks):
    for collective in (all_gather, all_reduce, all_to_all):
        assert collective(A100, factor * nbytes, ranks) >= collective(A100, nbytes, ranks)

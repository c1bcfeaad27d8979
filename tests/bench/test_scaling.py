"""The model of step time: by hand on round numbers, its laws, and the published runs it is held against."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from batchnorm.bench.clusters import (
    A100_INFINIBAND,
    CLUSTERS,
    NETWORKS,
    P100_ETHERNET,
    PASSES,
    RANKS,
    bn_inception,
    resnet50,
    table,
)
from batchnorm.bench.scaling import Cluster, Line, Measured, Route, Work, step_time, stretch, waited_s

RING = Route(kind="ring", start_s=10.0, inside_s=1.0, between_s=100.0, share=1.0)
TREE = Route(kind="tree", start_s=10.0, inside_s=1.0, between_s=100.0, share=0.5)


def cluster(*routes: Route) -> Cluster:
    """Nodes of 4, a byte a second inside, half a byte between."""
    return Cluster(
        name="slow",
        per_node=4,
        inside_bytes_s=1.0,
        between_bytes_s=0.5,
        memory_bytes_s=1.0,
        images_per_s=1.0,
        element_bytes=4,
        routes=routes,
    )


def test_gathering_goes_once_around_the_ring():
    inside = cluster(RING).gather_s(8, 4)
    assert inside == 10 + 3 * 1 + 3 * 8 / 1.0
    # Two nodes: one of seven steps is between them, and all bytes pass the narrow link.
    assert cluster(RING).gather_s(8, 8) == 10 + 6 * 1 + 1 * 100 + 7 * 8 / 0.5


def test_reducing_goes_twice_around_the_ring_or_up_and_down_a_tree():
    assert cluster(RING).reduce_s(8, 4) == 10 + 2 * 3 * 1 + 2 * 3 / 4 * 8
    assert cluster(TREE).reduce_s(8, 4) == 10 + 2 * 3 * 1 + 2 * 8 / 0.5
    # 32 ranks are 8 nodes: three levels of a tree, seven steps of a ring.
    assert cluster(TREE).reduce_s(8, 32) == 10 + 2 * (3 * 1 + 3 * 100) + 2 * 8 / 0.25
    assert cluster(RING).reduce_s(8, 32) == 10 + 2 * (24 * 1 + 7 * 100) + 2 * 31 / 32 * 8 / 0.5
    assert cluster(RING, TREE).reduce_s(8, 32) == cluster(TREE).reduce_s(8, 32)  # the faster one


def test_a_line_of_measured_links():
    links = Measured({4: Line(2.0, 10.0)}, {4: Line(3.0, 30.0)})
    assert links.gather_s(20, 4) == 2 + 3 * 20 / 10
    assert links.reduce_s(20, 4) == 3 + 1.5 * 20 / 30
    assert links.gather_s(20, 1) == links.reduce_s(20, 1) == 0


WORK = Work("two layers", num_parameters=6, channels=(1, 3), num_elements=10)
LINKS = Measured({2: Line(1.0, 8.0), 4: Line(2.0, 8.0)}, {2: Line(1.0, 8.0), 4: Line(2.0, 8.0)})


def test_a_step_by_hand():
    assert (WORK.gradient_bytes, WORK.gathered_bytes, WORK.summed_bytes) == (24, 8 * (3 + 7), 8 * (2 + 6))
    step = step_time(WORK, LINKS, ranks=2, compute_s=3.0, group_size=2, passes_s=0.5, overlap=0.0)
    # Layers of 3 and 7 numbers forward, of 2 and 6 backward, 8 bytes each; the gradient's 24 bytes once.
    assert (step.gather_s, step.reduce_s, step.gradient_s) == (2 * 1 + 3 + 7, 2 * 1 + 2 + 6, 1 + 24 / 8)
    assert step.total_s == 3 + 0.5 + 12 + 10 + 4
    assert step.efficiency == 3 / 29.5


def test_subgroups_pay_for_their_size_and_gradients_for_all():
    local, pairs, synced = (
        step_time(WORK, LINKS, ranks=4, compute_s=1.0, group_size=g, overlap=0.0) for g in (1, 2, 4)
    )
    assert local.gradient_s == pairs.gradient_s == synced.gradient_s == 2 + 1.5 * 24 / 8
    assert pairs.gather_s == 12
    assert synced.gather_s == 2 * 2 + 3 * (3 + 7)


def test_gradients_hide_behind_the_backward_but_for_the_last_bucket():
    links = Measured({}, {2: Line(0.0, 25 * 2**20)})  # a second for each bucket
    gradient = 4 * 25 * 2**20
    assert waited_s(gradient, links, 2, hidden_s=0.0) == 4
    assert waited_s(gradient, links, 2, hidden_s=1.5) == 2.5
    assert waited_s(gradient, links, 2, hidden_s=100.0) == 1
    assert waited_s(gradient, links, 1, hidden_s=0.0) == 0


@pytest.mark.parametrize("group_size", [1, 8], ids=["local", "groups of 8"])
@pytest.mark.parametrize("name", CLUSTERS)
def test_local_normalization_sends_nothing_and_one_rank_waits_for_nothing(name, group_size):
    for row in table(bn_inception(), CLUSTERS[name], batch=32, group_size=group_size):
        assert (row.local.passes_s, row.local.gather_s, row.local.reduce_s) == (0, 0, 0)
        if group_size == 1:
            assert row.subgroup == row.local
        if row.ranks == 1:
            assert row.local == row.subgroup == row.synced
            assert row.local.total_s == row.local.compute_s
            assert row.local.efficiency == 1
        elif row.ranks <= group_size:
            assert row.subgroup == row.synced
        else:
            assert row.local.total_s <= row.subgroup.total_s < row.synced.total_s


@pytest.mark.parametrize("field", ["start_s", "inside_s", "between_s"])
def test_slower_links_never_make_a_step_faster(field):
    def totals(times: float) -> list[float]:
        routes = tuple(replace(r, **{field: times * getattr(r, field)}) for r in A100_INFINIBAND.routes)
        rows = table(resnet50(), replace(A100_INFINIBAND, routes=routes), batch=32)
        return [step.total_s for row in rows for step in row[1:]]

    slower = [totals(times) for times in (1.0, 2.0, 10.0)]
    for fast, slow in pairwise(slower):
        assert all(a <= b for a, b in zip(fast, slow, strict=True))
        assert fast[-1] < slow[-1]


@pytest.mark.parametrize("name", CLUSTERS)
def test_more_ranks_never_make_a_step_faster(name):
    rows = table(bn_inception(), CLUSTERS[name], batch=32)
    assert [row.ranks for row in rows] == list(RANKS)
    for before, after in pairwise(rows):
        assert all(a.total_s <= b.total_s for a, b in zip(before[1:], after[1:], strict=True))


def test_networks_send_what_their_layers_have():
    inception, resnet = (build() for build in NETWORKS.values())
    assert (len(inception.channels), sum(inception.channels)) == (69, 9952)
    assert inception.gathered_bytes == 8 * (2 * 9952 + 69)
    # 64 + 3·(64+64+256) + 256 of the first stage, and so on: He et al., table 1.
    assert (len(resnet.channels), sum(resnet.channels)) == (53, 26560)
    assert resnet.summed_bytes == 8 * 2 * 26560


def test_a_published_run_with_local_normalization():
    """Goyal et al.: 8,192 images on 256 P100 in an hour; the rate of one is from their 8 in 29 hours."""
    step = next(row for row in table(resnet50(), P100_ETHERNET, batch=32) if row.ranks == 256).local
    hours = step.total_s * 90 * 1_281_167 / 8192 / 3600
    assert 0.9 < hours < 1.0


def test_the_passes_are_those_of_the_memory():
    row = table(WORK, cluster(RING), batch=2)[1]
    assert row.synced.passes_s == PASSES * 2 * 10 * 4
    assert row.synced.compute_s == 2


def test_processes_share_cores():
    assert [stretch(n, 2) for n in (1, 2, 4)] == [1, 1, 2]


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="multiple of group_size, got 4 and 3"):
        step_time(WORK, LINKS, ranks=4, compute_s=1.0, group_size=3)
    with pytest.raises(ValueError, match="overlap must be a share"):
        step_time(WORK, LINKS, ranks=4, compute_s=1.0, overlap=2.0)


def test_the_page_has_the_models_tables():
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
    for build, gpu in ((bn_inception, "a100"), (resnet50, "a100"), (resnet50, "p100")):
        for row in table(build(), CLUSTERS[gpu], batch=32):
            steps = " | ".join(f"{1000 * s.total_s:.1f} ({100 * s.efficiency:.0f} %)" for s in row[1:])
            parts = (row.synced.gather_s, row.synced.reduce_s, row.synced.passes_s)
            assert f"| {row.ranks:,} | {steps} | {' | '.join(f'{1000 * s:.1f}' for s in parts)} |\n" in page

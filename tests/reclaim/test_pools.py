"""Pools: who is let in, and who is not, in numbers."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outboard.errors import RefusedError, SpecError
from outboard.reclaim.pools import Pool, Pools, Promise

MIB = 1 << 20


def promise(pool: str, mebibytes: int) -> Promise:
    return Promise(pool, mebibytes * MIB)


def test_a_vm_that_could_outgrow_the_reservation_is_refused_with_numbers() -> None:
    pools = Pools(1024 * MIB, {})
    there = {"a": promise("", 600)}
    pools.admit("b", promise("", 424), there)
    with pytest.raises(RefusedError) as caught:
        pools.admit("b", promise("", 425), there)
    assert caught.value.reason == "swap-reservation"
    assert "b could have 425 MiB swapped out; the swap reservation is 1024 MiB" in str(caught.value)
    assert "600 MiB are spoken for and 424 MiB left" in str(caught.value)
    # Who is looked at again is not counted twice.
    pools.admit("a", promise("", 1024), there)


def test_what_is_set_aside_for_a_pool_is_nobody_elses() -> None:
    pools = Pools(1024 * MIB, {"prod": Pool(reservation="512MiB")})
    pools.admit("a", promise("", 512), {})
    with pytest.raises(RefusedError, match="512 MiB are spoken for"):
        pools.admit("a", promise("", 513), {})
    # A pool without a limit takes more than it was set aside, where there is.
    pools.admit("b", promise("prod", 700), {"a": promise("", 300)})
    with pytest.raises(RefusedError):
        pools.admit("b", promise("prod", 700), {"a": promise("", 400)})


def test_a_limit_holds_for_all_below_it() -> None:
    pools = Pools(
        1024 * MIB,
        {"prod": Pool(limit="600MiB"), "prod/web": Pool(reservation="200MiB"), "prod/db": Pool(limit="1GiB")},
    )
    pools.admit("a", promise("prod/db", 400), {})
    with pytest.raises(RefusedError, match=r"pool prod \(limit\) is 600 MiB, of which 200 MiB are spoken for"):
        pools.admit("a", promise("prod/db", 401), {})
    with pytest.raises(RefusedError, match=r"no pool 'test' on this host .known: prod, prod/db, prod/web"):
        pools.admit("a", promise("test", 1), {})


@pytest.mark.parametrize(
    ("pools", "says"),
    [
        ({"prod/web": Pool()}, "is below 'prod', and there is no such pool"),
        ({"prod": Pool(reservation="2GiB")}, "the pools below the reservation reserve 2048 MiB, and it has 1024 MiB"),
        ({"prod": Pool(limit="9MiB"), "prod/web": Pool(reservation="10MiB")}, "the pools below prod reserve 10 MiB"),
        ({"/": Pool()}, "no such pool"),
    ],
)
def test_pools_that_cannot_be_are_refused(pools: dict[str, Pool], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        Pools(1024 * MIB, pools)


def test_a_pool_says_what_is_wrong_with_it() -> None:
    for text, says in (
        (b'{"shares": 0}', "must be 1 or more"),
        (b'{"reservation": "2GiB", "limit": "1GiB"}', "less than its reservation"),
        (b'{"shres": 1}', "unknown field"),
    ):
        with pytest.raises(msgspec.ValidationError, match=says):
            msgspec.json.decode(text, type=Pool)


def test_shares_divide_from_the_root_down() -> None:
    pools = Pools(1024 * MIB, {"prod": Pool(shares=3000), "prod/web": Pool(shares=1000), "test": Pool(shares=1000)})
    assert pools.shares("", {}) == 1
    assert pools.shares("prod", {}) == 0.75
    assert pools.shares("prod/web", {}) == 0.75
    assert pools.shares("prod/web", {"a": promise("prod", 1)}) == 0.375
    use = {one.pool: (one.promised, one.needed) for one in pools.use({"a": promise("prod/web", 5)})}
    assert use == {
        "": (5 * MIB, 5 * MIB),
        "prod": (5 * MIB, 5 * MIB),
        "prod/web": (5 * MIB, 5 * MIB),
        "test": (0, 0),
    }


@given(
    st.lists(st.tuples(st.sampled_from(["", "a", "a/b", "c"]), st.integers(0, 500)), max_size=12),
    st.integers(0, 300),
    st.integers(0, 300),
)
def test_whoever_is_admitted_finds_what_was_promised(wanted: list[tuple[str, int]], a: int, c: int) -> None:
    reserved = {"a": a, "a/b": 0, "c": c}
    pools = Pools(
        1000 * MIB, {name: Pool(reservation=f"{size}MiB" if size else None) for name, size in reserved.items()}
    )
    there: dict[str, Promise] = {}
    for number, (pool, size) in enumerate(wanted):
        try:
            pools.admit(f"vm-{number}", promise(pool, size), there)
        except RefusedError:
            continue
        there[f"vm-{number}"] = promise(pool, size)
    assert sum(one.size for one in there.values()) <= 1000 * MIB
    for name in ("a", "c"):
        others = sum(one.size for one in there.values() if one.pool.partition("/")[0] != name)
        assert others + reserved[name] * MIB <= 1000 * MIB

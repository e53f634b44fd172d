"""The rule, against statements that do not use it: over random plans, at any speed of any rank; and planted mutants."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans import Plan, job
from symbolic_line import MakeScripts, SymbolicLine, Wrong, named

from cineline.core.config import ParallelConfig
from cineline.core.request import Group, Kind
from cineline.schedule.rule import Parcel, Rule, Scripts, edges_of, groups_of, scripts_of
from cineline.schedule.words import Action, Edge, Message, Post, Script, Send, Value, Wait, Way

seeds = st.integers(0, 2**32)


@settings(max_examples=500, deadline=None)
@given(seed=seeds)
def test_each_value_is_made_once_before_its_use_and_nothing_deadlocks(seed: int) -> None:
    draw = random.Random(seed)
    SymbolicLine(Plan.drawn(draw), draw).run()


def test_a_cancel_is_answered_where_the_tail_has_no_part_in_the_rest() -> None:
    """It neither decodes, nor, with split experts, makes the steps of the first: it may have forgotten the request."""
    lines = [ParallelConfig(pp=2, vae_split=(1, 0)), ParallelConfig(pp=2, expert_placement="split", high_stages=1)]
    for parallel, chunks in zip(lines, (3, 0), strict=True):
        for seed in range(100):
            draw, jobs = random.Random(seed), tuple(job(number, chunks=chunks) for number in range(2))
            SymbolicLine(Plan(parallel, jobs, high=(3, 3), in_flight=1, cancels={0: seed % 10}), draw).run()


def requests_of(plan: Plan, make_scripts: MakeScripts = scripts_of) -> Iterator[tuple[list[Group], list[Scripts]]]:
    """Of each request its groups, and every rank's scripts."""
    for one in plan.jobs:
        places = map(plan.parallel.place, range(plan.parallel.ranks))
        shape = plan.settled(one).shape
        rules = [Rule(plan.parallel, shape, tuple(plan.experts(one)), place) for place in places]
        yield list(groups_of(plan.parallel, shape)), list(map(make_scripts, rules))


def check_edges(plan: Plan, make_scripts: MakeScripts = scripts_of) -> None:
    """Both ends list the same messages in the same order; each is posted with the item that makes it or before."""
    known = set(edges_of(plan.parallel))
    for groups, scripts in requests_of(plan, make_scripts):
        sent: dict[Edge, list[Message]] = defaultdict(list)
        posted: dict[Edge, list[Message]] = defaultdict(list)
        sent_at: dict[Message, tuple[int, int]] = {}
        posted_at: dict[Message, tuple[int, int]] = {}
        for own in scripts:
            for at, group in enumerate(groups):
                for number, script in enumerate(own.get(group, ())):
                    for action in (*script.ahead, *script.run):
                        if isinstance(action, Post):
                            posted[action.edge].append(named(action))
                            posted_at[named(action)] = at, number
                        elif isinstance(action, Send):
                            sent[action.edge].append(named(action))
                            sent_at[named(action)] = at, number
        assert sent == posted
        assert set(sent) <= known
        assert all(len(set(messages)) == len(messages) for messages in sent.values())
        assert all(posted_at[message] <= sent_at[message] for message in sent_at)


@settings(max_examples=200, deadline=None)
@given(seed=seeds)
def test_both_ends_of_an_edge_list_the_same_messages_in_time(seed: int) -> None:
    check_edges(Plan.drawn(random.Random(seed)))


@settings(max_examples=200, deadline=None)
@given(seed=seeds)
def test_what_a_later_item_needs_is_posted_where_its_maker_ends(seed: int) -> None:
    """Ahead of the item what it needs itself, behind it what later ones need: else one edge would have two orders."""
    for _, scripts in requests_of(Plan.drawn(random.Random(seed))):
        for script in (script for own in scripts for found in own.values() for script in found):
            assert {post.edge.way for post in script.ahead} <= {Way.AHEAD}
            assert {post.edge.way for post in script.run if isinstance(post, Post)} <= {Way.BACK}


def ends(edges: Iterable[Edge]) -> dict[Way, set[tuple[int, int]]]:
    return {way: {(edge.source, edge.target) for edge in edges if edge.way is way} for way in Way}


def test_the_edges_of_two_lines_by_hand() -> None:
    """Three stages of two lines are the ranks 0 to 2 and 3 to 5. The fourth of four stages alone decodes, which two
    experts share as 1 and 3."""
    chains = {(0, 1), (1, 2), (3, 4), (4, 5)}
    assert ends(edges_of(ParallelConfig(pp=3, cfg=2))) == {
        Way.AHEAD: chains | {(5, 2)},  # the second line's prediction
        # Latents to both heads, embeddings to their own; latents to the other end, which may skip steps.
        Way.BACK: {(2, 0), (2, 3), (5, 3), (2, 5)},
    }
    split = ParallelConfig(pp=4, expert_placement="split", high_stages=1, vae_decode="tail")
    assert ends(edges_of(split)) == {
        Way.AHEAD: {(0, 1), (1, 2), (2, 3)},
        Way.BACK: {
            (3, 0),  # embeddings
            (3, 1),  # the second expert's latents; the first one's end is its head
            (0, 1),  # latents to the second expert
            (0, 3),  # history to its end, or to decode
        },
    }


# Mutants: rules that are wrong in one thing.


def late_post(rule: Rule) -> Scripts:
    """The receive of latents is posted only when they are needed."""

    def late(script: Script) -> Script:
        run: list[Action] = []
        for action in script.run:
            if isinstance(action, Post) and action.value is Value.LATENTS:
                continue
            if isinstance(action, Wait) and action.value is Value.LATENTS:
                run.append(Post(action.edge, action.item, action.value))
            run.append(action)
        return replace(script, run=tuple(run))

    return {group: tuple(map(late, own)) for group, own in scripts_of(rule).items()}


def with_parcels(change: Callable[[Parcel], list[Parcel]]) -> MakeScripts:
    """Scripts of a rule whose parcels are changed."""

    class Changed(Rule):
        def parcels(self, group: Group) -> Iterator[Parcel]:
            for parcel in super().parcels(group):
                yield from change(parcel)

    return lambda rule: scripts_of(Changed(rule.parallel, rule.shape, rule.experts, rule.place))


def wrong_due(parcel: Parcel) -> list[Parcel]:
    """Latents of the first step are said to be for the step after the next."""
    is_it = parcel.value is Value.LATENTS and parcel.due.kind is Kind.DENOISE and parcel.due.number == 1
    return [replace(parcel, due=parcel.due._replace(number=2)) if is_it else parcel]


def dropped(value: Value) -> Callable[[Parcel], list[Parcel]]:
    return lambda parcel: [] if parcel.value is value else [parcel]


def freed_early(parcel: Parcel) -> list[Parcel]:
    """Latents to decode are given back after the first chunk."""
    return [replace(parcel, until=None)]


def skipped_by_the_head(rule: Rule) -> Scripts:
    """Latents for a skipped step go to the head."""
    plain = rule.shape._replace(skipped=())
    return scripts_of(replace(rule, shape=plain))


def late_history(parcel: Parcel) -> list[Parcel]:
    """Latents that a residual is of come when the step is finished."""
    return [replace(parcel, at_finish=parcel.value in (Value.HISTORY, Value.PREDICTION))]


def to_heads_alone(rule: Rule) -> Scripts:
    """The second line's end gets no latents of a step that is computed, and has none for the residual."""

    class Changed(Rule):
        def parcels(self, group: Group) -> Iterator[Parcel]:
            for parcel in super().parcels(group):
                stages = self.chain(parcel.due) if parcel.due.kind is Kind.DENOISE else ()
                place = self.parallel.place(parcel.target)
                if parcel.value is not Value.LATENTS or len(stages) < 2 or not place.cfg or place.pp == 0:
                    yield parcel

    return scripts_of(Changed(rule.parallel, rule.shape, rule.experts, rule.place))


MUTANTS = {
    "late post": late_post,
    "skipped by the head": skipped_by_the_head,
    "late history": with_parcels(late_history),
    "to heads alone": to_heads_alone,
    "wrong due turn": with_parcels(wrong_due),
    **{
        f"dropped {value.value}": with_parcels(dropped(value))
        for value in Value
        if value not in (Value.TEXT, Value.CONDITIONING, Value.HIDDEN, Value.CHUNK)
    },
    "freed early": with_parcels(freed_early),
}


def is_found(make_scripts: MakeScripts, seed: int) -> bool:
    draw = random.Random(seed)
    try:
        SymbolicLine(Plan.drawn(draw), draw, make_scripts).run()
    except Wrong:
        return True
    return False


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_found(name: str) -> None:
    assert any(is_found(MUTANTS[name], seed) for seed in range(100))


def test_the_rule_passes_the_plans_that_the_mutants_do_not() -> None:
    assert not any(is_found(scripts_of, seed) for seed in range(100))


def test_a_late_post_is_seen_in_the_scripts_alone() -> None:
    with pytest.raises(AssertionError):
        for seed in range(20):
            check_edges(Plan.drawn(random.Random(seed)), late_post)

"""Who does what for a work item, and what goes where: the one place that says so (no torch).

An item crosses a chain of ranks, each of which hands what it has computed to the next. What the chain's end makes for
a later item, or for the same one on the other line, is a parcel. `Rule` says which chains and parcels there are;
each rank's scripts follow from it. The stage loop does them, the simulator replays them, and `edges_of` collects the
edges that they use.

Legend: a line runs one branch of guidance, or both; a lane is the ranks of equal ring, ulysses and tp coordinates,
one a stage; head and tail are a line's first and last stage; a route is the stages that run a step. Of a step that is
skipped (`Job.skipped`) that is the last of them alone, which adds to the latents what it kept of an earlier step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Branch, Group, Kind, Shape, WorkItem
from cineline.schedule.words import Action, Compute, Do, Edge, Free, Keep, Meet, Post, Script, Send, Value, Wait, Way

HANDED_ON = {
    Kind.TEXT: Value.TEXT,
    Kind.ENCODE: Value.CONDITIONING,
    Kind.DENOISE: Value.HIDDEN,
    Kind.DECODE: Value.CHUNK,
}
"""What goes from each rank of a chain to the next."""

Scripts = Mapping[Group, tuple[Script, ...]]
"""What a rank does for a request, by group, an entry an item; a group with which it has nothing to do is not in.

Requests alike share their scripts: groups and items are those of request 0."""


def groups_of(parallel: ParallelConfig, shape: Shape, request: int = 0) -> Iterator[Group]:
    """All groups of a request, in the order of the stream."""
    size = 1 if parallel.cfg == 2 else shape.branches
    if shape.texts:
        yield Group(Kind.TEXT, request, shape.texts[0], min(size, len(shape.texts)))
    yield Group(Kind.ENCODE, request)
    yield from (Group(Kind.DENOISE, request, step, size) for step in range(shape.first_step, shape.steps))
    yield from (Group(Kind.DECODE, request, chunk) for chunk in range(shape.chunks))


Named = tuple[Edge, WorkItem, Value]
"""A message, as `words.Message` takes it."""


@dataclass(frozen=True)
class Parcel:
    """What the end of an item's chain makes for another item, or for the same one on the other line.

    Attributes:
        value: what it is. item: that makes it. source, target: ranks.
        way: ahead where the same group needs it.
        due: the group that needs it. until: the last one that does, if it is another.
        at_finish: only the target's FINISH needs it, so that what it computes before need not wait.
    """

    value: Value
    item: WorkItem
    source: int
    target: int
    way: Way
    due: Group
    until: Group | None = None
    at_finish: bool = False

    @property
    def message(self) -> Named:
        """What both ends call it."""
        return Edge(self.way, self.source, self.target), self.item, self.value

    @property
    def travels(self) -> bool:
        """Whether it goes to another rank."""
        return self.source != self.target


@dataclass(frozen=True)
class Rule:
    """The chains and parcels of one request, in one lane. Its first step waits for no parcel: a new request's latents
    are noise, another one's are in its snapshot.

    Args:
        parallel: placed: nothing left open.
        shape: of the request. experts: of each of its steps, those before its first one included; the steps of some
            have the first branch alone (`Shape.unguided`), and a second line nothing to do then.
        place: of the rank whose lane and line it is.
    """

    parallel: ParallelConfig
    shape: Shape
    experts: tuple[int, ...]
    place: Place

    def chain(self, group: Group) -> tuple[int, ...]:
        """The ranks of this lane and line that run the group's items, first to last."""
        one_lane_alone = group.kind in (Kind.TEXT, Kind.DECODE)
        first_line_alone = group.kind is Kind.DECODE or self._is_unguided(group)
        if (one_lane_alone and not self.place.is_first_lane) or (first_line_alone and self.place.cfg):
            return ()
        line = self._lines[self.place.cfg]
        return tuple(line[stage] for stage in self._stages(group))

    def items(self, group: Group, line: int) -> list[WorkItem]:
        """The group's in a line of the lane, in order; none of a second line that has no part in it."""
        items = group.items(line)
        return [item for item in items if item.branch is Branch.COND] if self._is_unguided(group) else items

    def _is_unguided(self, group: Group) -> bool:
        """Whether it is a step that has the first branch alone."""
        return group.kind is Kind.DENOISE and self.experts[group.number] in self.shape.unguided

    def _stages(self, group: Group) -> Sequence[int]:
        """Those with a part in it: what has no layer or unit on a stage goes past it."""
        match group.kind:
            case Kind.TEXT:
                return self.parallel.encoders
            case Kind.DENOISE:
                return self._crossed(group.number)
            case Kind.DECODE:
                return self.parallel.decoders
            case _:
                return range(self.parallel.pp)

    def parcels(self, group: Group) -> Iterator[Parcel]:
        """What the group's items make, on all lines of the lane, in the order in which it is sent."""
        if group.kind is Kind.TEXT and self.place.is_first_lane:
            yield from self._embeddings(group)
        if group.kind is Kind.DENOISE:
            stage = self._routes[group.number][-1]
            first, *others = ((line[stage], self.items(group, number)[-1]) for number, line in self._used(group))
            for end, item in others:
                yield Parcel(Value.PREDICTION, item, end, first[0], Way.AHEAD, due=group, at_finish=True)
            if group.number + 1 < len(self.experts):
                yield from self._to_next_step(group, *first)
            elif self.shape.chunks and self.place.is_first_lane:
                yield from self._to_decode(*first)

    def _embeddings(self, group: Group) -> Iterator[Parcel]:
        """Each from its line's tail to its line's head."""
        due = Group(Kind.ENCODE, 0)
        for number, line in self._used(group):
            for item in self.items(group, number):
                yield Parcel(Value.EMBEDDING, item, line[-1], line[0], Way.BACK, due)

    def _to_next_step(self, group: Group, end: int, item: WorkItem) -> Iterator[Parcel]:
        due = group._replace(number=group.number + 1)
        first, last, keeps = self._crossed(due.number)[0], self._routes[due.number][-1], self.shape.goes_on(due.number)
        for number, line in self._used(due):
            # What a residual is of, the first line's last stage has by itself.
            stages = {first: None, last: None} if keeps and number else (first,)
            for stage in stages:
                yield Parcel(Value.LATENTS, item, end, line[stage], Way.BACK, due)
        if self.moves(group):
            yield Parcel(Value.HISTORY, item, end, self._lines[0][last], Way.BACK, due, at_finish=not keeps)

    def _to_decode(self, end: int, item: WorkItem) -> Iterator[Parcel]:
        """Latents to where decoding begins; by rows to the last one, who hands them to all."""
        first, last = (Group(Kind.DECODE, 0, chunk) for chunk in (0, self.shape.chunks - 1))
        decoders = [self._lines[0][stage] for stage in self.parallel.decoders]
        target = decoders[-1 if self.parallel.decodes_together else 0]
        if target != end:
            yield Parcel(Value.LATENTS, item, end, target, Way.BACK, first, until=last)

    def moves(self, group: Group) -> bool:
        """Whether the request goes on in another group of stages."""
        routes = self._routes[group.number : group.number + 2] if group.kind is Kind.DENOISE else []
        return len(routes) == 2 and routes[0] != routes[1]

    def _crossed(self, step: int) -> range:
        """Those of a step's stages that its items cross."""
        route = self._routes[step]
        return route[-1:] if step in self.shape.skipped else route

    @cached_property
    def _routes(self) -> list[range]:
        """The stages of each step's expert."""
        return [self.parallel.route(expert) for expert in self.experts]

    @cached_property
    def _lines(self) -> list[tuple[int, ...]]:
        """The lane's ranks, by line and stage."""
        return [
            tuple(self.parallel.rank(replace(self.place, pp=stage, cfg=line)) for stage in range(self.parallel.pp))
            for line in range(self.parallel.cfg)
        ]

    def _used(self, group: Group) -> Iterator[tuple[int, tuple[int, ...]]]:
        """The lines that have a part in it, by number: without guidance there is nothing for the second one."""
        return enumerate(self._lines[: 1 if self._is_unguided(group) else self.shape.branches])


@lru_cache(maxsize=256)
def scripts_of(rule: Rule) -> Scripts:
    """What the rule's rank does for the request: nothing, where it has no part in it."""
    if rule.place.cfg >= rule.shape.branches:
        return {}
    scripts = _Part(rule).scripts()
    _end_with(Do.FORGET, scripts)
    before = {group: own for group, own in scripts.items() if group.kind is not Kind.DECODE}
    if len(before) < len(scripts):
        scripts |= _end_with(Do.DENOISED, before)
    return scripts


def drop_of(rule: Rule) -> Script:
    """What the rule's rank does for a group that ends a request; who keeps the request to its last group says so."""
    *_, last = groups_of(rule.parallel, rule.shape)
    tells = rule.place.leads and rule.chain(last)[-1:] == (rule.parallel.rank(rule.place),)
    return Script(WorkItem(Kind.DROP, 0), (), (Do.FORGET, Do.DONE) if tells else (Do.FORGET,))


def _end_with(word: Do, scripts: dict[Group, tuple[Script, ...]]) -> Scripts:
    """The scripts, in whose last one that word is the end."""
    group, own = list(scripts.items())[-1]
    scripts[group] = (*own[:-1], replace(own[-1], run=(*own[-1].run, word)))
    return scripts


class _Part:
    """One rank's part in one request."""

    def __init__(self, rule: Rule) -> None:
        self._rule, self._place = rule, rule.place
        self._rank = rule.parallel.rank(rule.place)
        self._parcels = {group: list(rule.parcels(group)) for group in groups_of(rule.parallel, rule.shape)}
        self._due: dict[Group, list[Parcel]] = defaultdict(list)
        self._until: dict[Group, list[Parcel]] = defaultdict(list)
        for parcel in (parcel for made in self._parcels.values() for parcel in made if self._comes(parcel)):
            self._due[parcel.due].append(parcel)
            self._until[parcel.until or parcel.due].append(parcel)

    def scripts(self) -> dict[Group, tuple[Script, ...]]:
        found = {}
        for group in self._parcels:
            # What comes at a step that a second line has no part in, comes with the first line's item.
            items = self._rule.items(group, self._place.cfg) or self._rule.items(group, 0)
            own = tuple(self._script(group, item, item is items[0], item is items[-1]) for item in items)
            if any(script.ahead or script.run for script in own):
                found[group] = own
        return found

    def _script(self, group: Group, item: WorkItem, first: bool, last: bool) -> Script:
        """What the rank does for an item, the group's `first` one, its `last` one, or both."""
        chain = self._rule.chain(group)
        ahead, run = self._cross(group, item, chain, first, last) if self._rank in chain else ([], [])
        # What the other line makes is made at the same place of the group.
        here = [parcel for parcel in self._parcels[group] if parcel.item.branch == item.branch or group.size == 1]
        coming = [parcel for parcel in here if self._comes(parcel)]
        ahead += [Post(*parcel.message) for parcel in coming if parcel.way is Way.AHEAD]
        run += [Post(*parcel.message) for parcel in coming if parcel.way is Way.BACK]
        return Script(item, tuple(ahead), tuple(run))

    def _cross(
        self, group: Group, item: WorkItem, chain: tuple[int, ...], first: bool, last: bool
    ) -> tuple[list[Post], list[Action]]:
        """What a rank of the chain does when it looks at an item, and when it is the item's turn."""
        at, due = chain.index(self._rank), self._due[group]
        ends = at + 1 == len(chain)
        came, goes = self._handed(group, item, chain, at), self._handed(group, item, chain, at + 1)
        made = [parcel for parcel in self._parcels[group] if parcel.source == self._rank and parcel.item == item]
        finishes = ends and last and group.kind is Kind.DENOISE and self._place.cfg == 0
        answers = ends and last and group.kind is not Kind.ENCODE and self._place.leads
        run: list[Action] = [
            *(Wait(*message) for message in came),
            *(Wait(*parcel.message) for parcel in due if first and not parcel.at_finish),
            *[Do.BEGUN] * answers,
            Do.START,
            *self._compute(group, item, chain, Compute(starts=not came, ends=ends)),
            *(Wait(*parcel.message) for parcel in due if finishes and parcel.at_finish),
            *[Do.FINISH] * finishes,
            *(Send(*message) for message in goes),
            *(Send(*parcel.message) if parcel.travels else Keep(*parcel.message) for parcel in made),
            *[Do.MOVES if self._rule.moves(group) else Do.DONE] * answers,
            *(Free(*message) for message in came if not message[-1].stays),
            *(Free(*parcel.message) for parcel in self._until[group] if last),
        ]
        return [Post(*message) for message in came], run

    def _handed(self, group: Group, item: WorkItem, chain: tuple[int, ...], to: int) -> list[Named]:
        """What the chain's rank number `to` gets from the one before it."""
        if to in (0, len(chain)) or self._together(group):
            return []
        return [(Edge(Way.AHEAD, chain[to - 1], chain[to]), item, HANDED_ON[group.kind])]

    def _compute(self, group: Group, item: WorkItem, chain: tuple[int, ...], own: Compute) -> list[Action]:
        return [Meet(chain, item, "latents"), own, Meet(chain, item, "frames")] if self._together(group) else [own]

    def _together(self, group: Group) -> bool:
        return group.kind is Kind.DECODE and self._rule.parallel.decodes_together

    def _comes(self, parcel: Parcel) -> bool:
        return parcel.target == self._rank and parcel.travels


def edges_of(parallel: ParallelConfig) -> list[Edge]:
    """All edges that any job may use, in the one order in which every rank makes them."""
    everything, last = Shape(steps=3, branches=2, texts=(0, 1), chunks=2, skipped=(2,)), len(parallel.groups) - 1
    found: set[Edge] = set()
    for experts in {(0, 0, 0), (0, last, last), (last, last, last)}:
        for rank in range(parallel.ranks):
            own = scripts_of(Rule(parallel, everything, experts, parallel.place(rank))).values()
            actions = (action for scripts in own for script in scripts for action in (*script.ahead, *script.run))
            found |= {action.edge for action in actions if isinstance(action, Post)}
    return sorted(found, key=lambda edge: (edge.way.value, edge.source, edge.target))

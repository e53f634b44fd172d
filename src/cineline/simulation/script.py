"""What each rank does for each work item: `stage.StageLoop` as data, for the simulator (no torch).

Legend: the head is the first stage of a line, the tail its last; a route is the stages that run a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from cineline.config import ParallelConfig, Place
from cineline.request import Branch, Job, Kind, WorkItem
from cineline.simulation.actions import Action, Do, Edge, Meet, Post, Script, Send, Wait


class Part:
    """One rank's part in one request.

    Args:
        parallel: placed.
        place: of the rank, the first lane of its stage.
        experts: of each of the job's steps.
    """

    def __init__(self, parallel: ParallelConfig, place: Place, job: Job, experts: Sequence[int]) -> None:
        self.job = job
        self.takes_part = place.cfg < job.branches  # without guidance there is nothing for the second line
        self._parallel = parallel
        self._place = place
        self._stage = place.pp
        self._is_head = place.pp == 0
        self._is_tail = place.pp == parallel.pp - 1
        self._leads = place.cfg == 0
        self._routes = [parallel.groups[min(expert, len(parallel.groups) - 1)] for expert in experts]
        self._last_step = max((step for step, route in enumerate(self._routes) if self._stage in route), default=-1)
        every_stage = parallel.vae_decode in ("layers", "rows")
        self._decodes = job.chunks > 0 and self._leads and (every_stage or self._is_tail)
        self._joined = parallel.cfg == 2 and job.branches == 2  # guidance needs the second line's prediction

    def script(self, item: WorkItem) -> Script | None:
        """What the rank does for an item of the stream; None where it has nothing to do with it (any more)."""
        forgotten = not self._decodes and item.number > max(self._last_step, 0)
        if not self.takes_part or (item.kind is Kind.DENOISE and forgotten):
            return None
        if item.kind is Kind.DECODE and not self._decodes:
            return None
        does = {
            Kind.TEXT: self._text,
            Kind.ENCODE: self._encode,
            Kind.DENOISE: self._denoise,
            Kind.DECODE: self._decode,
        }
        ahead, waits, begun, body = does[item.kind](item)
        hidden = [Wait(post.edge, post.item) for post in ahead if post.edge.kind == "forward"]
        starts = [Do.BEGUN, Do.START] if begun else [Do.START]
        if self._parallel.cfg == 2 and item.kind in (Kind.TEXT, Kind.DENOISE):
            item = item._replace(branch=Branch(self._place.cfg))
        return Script(item, tuple(ahead), (*hidden, *waits, *starts, *body))

    # For each kind: the receives, what else to wait for before the start, whether the engine hears of it, the rest.

    def _text(self, item: WorkItem) -> tuple[list[Post], list[Wait], bool, list[Action]]:
        answers = item.last and self._is_tail and self._leads
        body: list[Action] = [Do.COMPUTE, Send(self._loop if self._is_tail else self._forward(self._stage), item)]
        if self._is_head:
            body.append(Post(self._loop, item))
        return self._hidden(item, first=0), [], answers, body + [Do.DONE] * answers

    def _encode(self, item: WorkItem) -> tuple[list[Post], list[Wait], bool, list[Action]]:
        texts = self._items_of(Kind.TEXT, 0) if self.job.texts and self._is_head else []
        sends = [] if self._is_tail else [Send(self._forward(self._stage), item)]
        return self._hidden(item, first=0), [Wait(self._loop, text) for text in texts], False, [Do.COMPUTE, *sends]

    def _denoise(self, item: WorkItem) -> tuple[list[Post], list[Wait], bool, list[Action]]:
        step, route = item.number, self._routes[item.number]
        ahead: list[Post] = []
        waits: list[Wait] = []
        body: list[Action] = []
        answers = False
        if self._stage in route:
            ahead = self._hidden(item, first=route.start)
            if self._stage == route.start and item.branch is Branch.COND and step:
                waits = [Wait(self._way_back(step - 1, self._place.cfg), self._last_of(step - 1))]
            body.append(Do.COMPUTE)
            if self._stage < route.stop - 1:
                body.append(Send(self._forward(self._stage), item))
            elif not self._leads:
                body.append(Send(self._guidance, item))
            else:
                answers = item.last
                ahead += [Post(self._guidance, item)] * self._joined
        if answers:
            body += self._advance(item)
        if item.last:
            body += self._end_step(item)
        return ahead, waits, answers, body

    def _advance(self, item: WorkItem) -> list[Action]:
        """Route's end: guidance, solver, the way back."""
        step, actions = item.number, list[Action]()
        goes_on, same_route = self._follows(step)
        if step and self._history_moves(step - 1):
            actions.append(Wait(self._history, self._last_of(step - 1)))
        if self._joined:
            actions.append(Wait(self._guidance, item))
        if goes_on:
            lines = range(min(self._parallel.cfg, self.job.branches))
            actions += [Send(self._way_back(step, line), item) for line in lines]
        if self._history_moves(step):
            actions.append(Send(self._history, item))
        if self._to_head(step):
            actions.append(Send(self._to_decode(step), item))
        return [*actions, Do.MOVES if goes_on and not same_route else Do.DONE]

    def _end_step(self, item: WorkItem) -> list[Action]:
        """After a step's last item, on every stage: get ready for what comes back, or forget the request."""
        step, actions = item.number, list[Action]()
        goes_on, _ = self._follows(step)
        if goes_on and self._stage == self._routes[step + 1].start:
            actions.append(Post(self._way_back(step, self._place.cfg), item))
        if self._is_tail and self._leads and self._history_moves(step):
            actions.append(Post(self._history, item))
        if self._is_head and self._leads and self._to_head(step):
            actions.append(Post(self._to_decode(step), item))
        if step >= self._last_step and not self._decodes:
            actions.append(Do.FORGET)
        return actions

    def _decode(self, item: WorkItem) -> tuple[list[Post], list[Wait], bool, list[Action]]:
        way, chunk, last = self._parallel.vae_decode, item.number, len(self._routes) - 1
        ahead = self._hidden(item, first=0) if way == "layers" else []
        waits: list[Wait] = []
        body: list[Action] = [Do.COMPUTE]
        if way == "layers":
            if self._is_head and chunk == 0:
                waits.append(Wait(self._to_decode(last), self._last_of(last)))
            if not self._is_tail:
                body.append(Send(self._forward(self._stage), item))
        if way == "rows":  # the tail's latents to all, halo rows all along, and all frames to the tail
            ranks = tuple(self._rank(stage) for stage in range(self._parallel.pp))
            body = [Meet(ranks, item, "latents"), *body, Meet(ranks, item, "frames")]
        if way != "layers" and chunk == 0 and self._is_tail and self._history_moves(last):
            body.insert(0, Wait(self._history, self._last_of(last)))
        forgets = [Do.FORGET] * (chunk == self.job.chunks - 1)
        return ahead, waits, self._is_tail, body + [Do.DONE] * self._is_tail + forgets

    # The job.

    def _items_of(self, kind: Kind, number: int) -> list[WorkItem]:
        """A turn's items of that kind, as the scheduler emits them."""
        count = 1 if self._parallel.cfg == 2 else self.job.branches
        return [WorkItem(kind, self.job.id, number, Branch(branch), branch == count - 1) for branch in range(count)]

    def _last_of(self, step: int) -> WorkItem:
        return self._items_of(Kind.DENOISE, step)[-1]

    def _follows(self, step: int) -> tuple[bool, bool]:
        """Whether a step comes after this one, and whether it has the same route."""
        goes_on = step + 1 < len(self._routes)
        return goes_on, goes_on and self._routes[step + 1] == self._routes[step]

    def _history_moves(self, step: int) -> bool:
        """Whether latents and history go to another route's end: the next step's, or the one that decodes."""
        goes_on, same_route = self._follows(step)
        decodes_elsewhere = self.job.chunks > 0 and self._parallel.vae_decode != "layers"
        return self._routes[step].stop != self._parallel.pp and not same_route and (goes_on or decodes_elsewhere)

    def _to_head(self, step: int) -> bool:
        """Whether the latents go to the head to be decoded."""
        return not self._follows(step)[0] and self.job.chunks > 0 and self._parallel.vae_decode == "layers"

    # Edges.

    def _rank(self, stage: int, line: int | None = None) -> int:
        return self._parallel.rank(replace(self._place, pp=stage, cfg=self._place.cfg if line is None else line))

    def _forward(self, source: int) -> Edge:
        return Edge("forward", self._rank(source), self._rank(source + 1))

    def _hidden(self, item: WorkItem, first: int) -> list[Post]:
        """The receive from the stage before, on all but the first stage of those that run the item."""
        return [Post(self._forward(self._stage - 1), item)] if self._stage > first else []

    @property
    def _loop(self) -> Edge:
        return Edge("loop", self._rank(self._parallel.pp - 1), self._rank(0))

    def _to_decode(self, step: int) -> Edge:
        """Over which the head gets the latents that the last step has made."""
        route = self._routes[step]
        return Edge("return", self._rank(route.stop - 1, 0), self._rank(0, 0)) if route.start == 0 else self._loop

    @property
    def _guidance(self) -> Edge:
        return Edge("guidance", self._rank(self._stage, 1), self._rank(self._stage, 0))

    @property
    def _history(self) -> Edge:
        high, low = self._parallel.groups
        return Edge("history", self._rank(high[-1], 0), self._rank(low[-1], 0))

    def _way_back(self, step: int, line: int) -> Edge:
        """Over which that line's next first stage gets the latents that the step has made."""
        route, following = self._routes[step], self._routes[step + 1]
        kind = "return" if route == following else "handover"
        return Edge(kind, self._rank(route.stop - 1, 0), self._rank(following.start, line))

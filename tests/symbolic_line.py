"""The line with symbols for tensors: what each item needs and makes, said without the rule, at any speed of any rank.

A symbol is a tuple of words. It is lent while its message's buffer is, and using it afterwards is an error. Sends are
rendezvous: none returns before its receive is posted. Which rank goes on next, which header comes when, and when the
engine hears of what, is drawn.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from plans import Plan

from cineline.core.config import ParallelConfig, Place
from cineline.core.request import Branch, Group, Job, Kind, WorkItem
from cineline.schedule.rule import Rule, Scripts, drop_of, scripts_of
from cineline.schedule.scheduler import Scheduler
from cineline.schedule.words import (
    RECEIVES_AHEAD,
    Action,
    Compute,
    Do,
    Edge,
    Free,
    Keep,
    Meet,
    Message,
    Post,
    Script,
    Send,
    Value,
    Wait,
)

Symbol = tuple[Any, ...]
Named = tuple[int, Message]
"""A message of a request."""
MakeScripts = Callable[[Rule], Scripts]


class Wrong(AssertionError):
    """What the line does is not what the model needs."""


def demand(holds: bool, *words: object) -> None:
    if not holds:
        raise Wrong(" ".join(map(str, words)))


@dataclass(eq=False)
class Held:
    """A symbol on a rank; not `alive` once its buffer is free again."""

    symbol: Symbol
    alive: bool = True

    def use(self, wanted: Symbol) -> None:
        demand(self.alive, "used after its buffer was given back:", self.symbol)
        demand(self.symbol == wanted, "needs", wanted, "and has", self.symbol)


def there(held: Held | None, *words: object) -> Held:
    if held is None:
        raise Wrong(" ".join(map(str, words)))
    return held


@dataclass
class State:
    """A request on a rank. `stepped` counts the steps that the solver's history knows of."""

    job: Job
    experts: list[int]
    latents: Held = field(default_factory=lambda: Held(("latents", 0)))
    stepped: int = 0
    texts: dict[int, Held] = field(default_factory=dict)
    conditioning: bool = False
    predictions: dict[int, Held] = field(default_factory=dict)
    residuals: dict[int, int] = field(default_factory=dict)  # by branch, of which step
    hidden: Held | None = None
    decoded: int = 0
    denoised: bool = False
    waited: dict[tuple[WorkItem, Value], Held | None] = field(default_factory=dict)


def text_item(plan: Plan, job: Job, branch: int) -> WorkItem:
    """Of the branch's prompt; where it is the second one's alone, on the one line, it has that number."""
    alone = plan.parallel.cfg == 1 and 0 not in job.shape.texts
    return WorkItem(Kind.TEXT, job.id, int(alone), Branch(branch))


class SymbolicRank:
    """The model, on one rank."""

    def __init__(self, plan: Plan, number: int, make_scripts: MakeScripts) -> None:
        self.plan, self.number, self.make_scripts = plan, number, make_scripts
        self.place = plan.parallel.place(number)
        self.states: dict[int, State] = {}
        self.scripts: dict[int, Scripts] = {}
        self.drops: dict[int, Script] = {}
        self.inbox: deque[Job | Group] = deque()
        self.coming: deque[tuple[Group, Script]] = deque()
        self.ahead: deque[tuple[Group, Script]] = deque()
        self.group: Group  # with the script
        self.script: Script | None = None
        self.due: deque[Action] = deque()
        self.computed: Counter[WorkItem] = Counter()
        self.jobs: dict[int, Job] = {}
        self.kept: dict[tuple[int, str], list[Symbol]] = {}
        self.prompts: dict[int, dict[int, list[Symbol]]] = {}

    def keep(self, job: Job) -> None:
        """As heads do: a place for each prompt, which whoever makes it fills."""
        self.jobs[job.id] = job
        if job.prompts is not None and self.place.cfg < job.branches:
            lines = self.plan.parallel.cfg
            branches = [self.place.cfg] if lines == 2 else range(job.branches)
            keys = {one: (one * (lines - 1), (job.prompt, job.negative_prompt)[one]) for one in branches}
            for one in branches:
                if one not in job.prompts.found:
                    self.kept[keys[one]] = []
                demand(keys[one] in self.kept, "finds what is not kept", keys[one])
            self.prompts[job.id] = {one: self.kept[keys[one]] for one in branches}
            for key in job.prompts.gone:
                self.kept.pop(key, None)
            demand(len(self.kept) <= self.plan.prompts, "keeps too many")

    def admit(self, job: Job) -> None:
        job = self.plan.settled(job)
        if self.place.pp == 0 and self.place.is_first_lane:
            self.keep(job)
        experts = self.plan.experts(job)
        rule = Rule(self.plan.parallel, job.shape, tuple(experts), self.place)
        scripts = self.make_scripts(rule)
        if scripts:
            state = self.states[job.id] = State(job, experts)
            self.scripts[job.id], self.drops[job.id] = scripts, drop_of(rule)
            if job.first_step:  # on the stages that go on with it
                goes_on = self.place.pp in route(self.plan.parallel, experts[job.first_step])
                state.latents = Held(("latents", job.first_step if goes_on else "unknown"))
                state.stepped = job.first_step if goes_on else -1

    @property
    def state(self) -> State:
        return self.states[self.group.request]

    @property
    def item(self) -> WorkItem:
        """The item that the rank is at."""
        assert self.script is not None
        return self.script.item._replace(request=self.group.request)

    def name(self, message: Message) -> Named:
        return self.group.request, named(message)

    def route(self, step: int) -> range:
        """The stages of a step."""
        return crossed(self.plan.parallel, self.state.job, self.state.experts, step)

    @property
    def decoding(self) -> list[int]:
        parallel = self.plan.parallel
        if parallel.vae_decode not in ("layers", "rows"):
            return [parallel.pp - 1]
        return [stage for stage in range(parallel.pp) if parallel.vae_split is None or parallel.vae_split[stage]]

    @property
    def texts(self) -> list[int]:
        parallel, ends = self.plan.parallel, (0, self.plan.parallel.pp - 1)
        split = parallel.text_split
        return [stage for stage in range(parallel.pp) if stage in ends or split is None or split[stage]]

    def compute(self, item: WorkItem, starts: bool, ends: bool) -> None:
        self.computed[item] += 1
        demand(self.computed[item] == 1, "computed twice:", item)
        state, came = self.state, self.state.hidden
        state.hidden = None
        stages = {
            Kind.TEXT: self.texts,
            Kind.ENCODE: range(self.plan.parallel.pp),
            Kind.DENOISE: self.route(item.number) if item.kind is Kind.DENOISE else range(0),
            Kind.DECODE: self.decoding,
        }[item.kind]
        together = item.kind is Kind.DECODE and self.plan.parallel.vae_decode == "rows"
        demand(self.place.pp in stages, "not a stage of", item)
        demand(starts == (together or self.place.pp == stages[0]), "starts", item)
        demand(ends == (self.place.pp == stages[-1]), "ends", item)
        if starts:
            demand(came is None or together, "is handed something, at the start of", item)
            self.start(item)
        elif item.kind is not Kind.ENCODE:  # the conditioning is no hidden state
            there(came, "nothing came for", item).use(("through", item, stages[stages.index(self.place.pp) - 1]))
        demand(item.kind is not Kind.ENCODE or state.conditioning, "no conditioning after", item)
        demand(item.kind is not Kind.DENOISE or (state.conditioning and not state.denoised), "no conditioning", item)
        if item.kind is Kind.DECODE:
            demand(item.number == state.decoded, "chunks out of order", item)
            state.decoded += 1
        if item.kind is Kind.DENOISE and ends:
            self.use_residual(item)
            state.predictions[item.branch] = Held(("prediction", item.number, item.branch))
        elif item.kind is not Kind.ENCODE:
            state.hidden = Held(("through", item, self.place.pp))

    def use_residual(self, item: WorkItem) -> None:
        """Behind a skipped step is the last computed one's; a computed one's is of the latents that it was made of."""
        state, step = self.state, item.number
        if step in state.job.skipped:
            last = max(each for each in range(step) if each not in state.job.skipped)
            demand(state.residuals.get(item.branch) == last, "no residual of step", last, "for", item)
            demand(state.experts[last] == state.experts[step], "another expert's residual for", item)
        elif step + 1 in state.job.skipped:
            state.latents.use(("latents", step))
            state.residuals[item.branch] = step

    def start(self, item: WorkItem) -> None:
        """What the first stage needs."""
        state = self.state
        if item.kind is Kind.ENCODE:
            lines = [self.place.cfg] if self.plan.parallel.cfg == 2 else range(state.job.branches)
            for branch in lines if state.job.texts and self.place.is_first_lane else ():
                self.use_text(branch, self.prompts.get(item.request, {}).get(branch))
            state.conditioning = True
        elif item.kind is Kind.DENOISE:
            state.latents.use(("latents", item.number))
        elif item.kind is Kind.DECODE and (
            self.plan.parallel.vae_decode != "rows" or self.place.pp == self.decoding[-1]
        ):
            state.latents.use(("latents", state.job.steps))

    def use_text(self, branch: int, kept: list[Symbol] | None) -> None:
        """An embedding that has come, or that is kept: of the same prompt, made once."""
        job = self.state.job
        if kept is None or branch in job.shape.texts:
            demand(branch in self.state.texts, "no embedding of branch", branch)
            text = text_item(self.plan, job, branch)
            self.state.texts[branch].use(("through", text, self.plan.parallel.pp - 1))
        if kept is not None:
            if branch in job.shape.texts:
                kept.append(("of", (job.prompt, job.negative_prompt)[branch]))
            wanted = ("of", (job.prompt, job.negative_prompt)[branch])
            demand(kept == [wanted], "kept for", wanted, "is", kept)

    def finish(self, item: WorkItem) -> None:
        state, step = self.state, item.number
        branches = branches_of(state.job, state.experts[step])
        demand(sorted(state.predictions) == branches, "predictions of", set(state.predictions))
        for branch, prediction in state.predictions.items():
            prediction.use(("prediction", step, branch))
        state.latents.use(("latents", step))
        demand(state.stepped == step, "the solver knows", state.stepped, "steps before step", step)
        state.latents, state.stepped = Held(("latents", step + 1)), step + 1
        state.predictions.clear()

    def answer(self, group: Group) -> None:
        """What the engine is told: of the last step the latents, of a chunk its frames."""
        if group.kind is Kind.DENOISE and group.number + 1 == self.state.job.steps:
            self.state.latents.use(("latents", self.state.job.steps))
        if group.kind is Kind.DECODE:
            there(self.state.hidden, "no frames").use(("through", self.item, self.decoding[-1]))
            self.state.hidden = None

    def give(self, value: Value, item: WorkItem) -> Symbol:
        state = self.state
        demand(value is not Value.CONDITIONING or state.conditioning, "no conditioning to send")
        if value in (Value.LATENTS, Value.HISTORY):
            demand(state.latents.alive, "sends latents whose buffer was given back")
            return (*state.latents.symbol, state.stepped)
        if value is Value.PREDICTION:
            return state.predictions.pop(item.branch).symbol
        if value is Value.CONDITIONING:
            return ("conditioning",)
        made, state.hidden = there(state.hidden, "nothing to send for", item), None
        demand(made.alive, "sends what was given back, for", item)
        return made.symbol

    def take(self, value: Value, item: WorkItem, symbol: Symbol) -> None:
        state, held = self.state, Held(symbol)
        state.waited[item, value] = held
        if value is Value.LATENTS:
            held.symbol = symbol[:2]
            state.latents = held
        elif value is Value.HISTORY:  # it is copied
            state.latents, state.stepped = Held(symbol[:2]), symbol[2]
        elif value is Value.PREDICTION:
            state.predictions[item.branch] = held
        elif value is Value.EMBEDDING:
            state.texts[item.branch] = held
        elif value is Value.CONDITIONING:
            state.conditioning = True
            state.waited[item, value] = None  # it stays
        else:
            demand(state.hidden is None, "two hidden states at once")
            state.hidden = held

    def free(self, message: Message) -> None:
        held = self.state.waited.pop((message.item, message.value), None)
        there(held, "given back before it came, or twice:", message).alive = False

    def forget(self, request: int, dropped: bool) -> None:
        state = self.states.pop(request)
        demand(dropped or not any(state.waited.values()), "kept a buffer:", state.waited)
        del self.scripts[request]


class SymbolicLine:
    """All ranks and the engine. `run` gives what happened, or raises `Wrong`."""

    def __init__(self, plan: Plan, draw: random.Random, make_scripts: MakeScripts = scripts_of) -> None:
        self.plan, self.draw = plan, draw
        self.ranks = [SymbolicRank(plan, number, make_scripts) for number in range(plan.parallel.ranks)]
        self.scheduler = Scheduler(plan.parallel, plan.in_flight, self.tell, plan.prompts)
        self.mail: list[deque[Job | Group]] = [deque() for _ in self.ranks]  # headers under way to each rank
        self.words: dict[int, deque[tuple[Do, Group]]] = defaultdict(deque)  # of each rank to the engine
        self.posted: dict[Edge, deque[Named]] = defaultdict(deque)
        self.here: dict[Named, Symbol] = {}
        self.meetings: Counter[tuple[int, Meet]] = Counter()
        self.met: set[tuple[int, int, Meet]] = set()
        self.heard = 0
        self.finished: set[int] = set()
        self.left = set(range(len(plan.jobs)))

    def tell(self, message: Job | Group) -> None:
        for mail in self.mail:
            mail.append(message)

    def emit(self, groups: list[Group]) -> None:
        for group in groups:
            self.tell(group)

    def run(self) -> None:
        for one in self.plan.jobs:
            self.scheduler.submit(one)
            self.emit(self.scheduler.pump())
        self.cancel()
        steps: list[Callable[[], bool]] = [
            partial(step, rank) for step in (self.deliver, self.step, self.hear) for rank in self.ranks
        ]
        going = True
        while going:
            going = any(step() for step in self.drawn(steps))
        self.check_end()

    def drawn(self, steps: list[Callable[[], bool]]) -> Iterator[Callable[[], bool]]:
        """All of them in a random order, which is drawn as far as it is asked for."""
        for left in range(len(steps), 0, -1):
            at = int(left * self.draw.random())
            steps[at], steps[left - 1] = steps[left - 1], steps[at]
            yield steps[left - 1]

    def deliver(self, rank: SymbolicRank) -> bool:
        if mail := self.mail[rank.number]:
            rank.inbox.append(mail.popleft())
            return True
        return False

    def hear(self, rank: SymbolicRank) -> bool:
        if not self.words[rank.number]:
            return False
        word, group = self.words[rank.number].popleft()
        self.heard += 1
        if word is Do.BEGUN:
            self.scheduler.begun(group)
        elif self.scheduler.complete(group, word is Do.MOVES):
            self.finished.add(group.request)
            self.left.discard(group.request)
        self.emit(self.scheduler.pump())
        self.cancel()
        return True

    def cancel(self) -> None:
        for number in [number for number in self.left if self.plan.cancels.get(number, self.heard + 1) <= self.heard]:
            drop = self.scheduler.cancel(number)
            self.emit(([drop] if drop else []) + self.scheduler.pump())
            self.left.discard(number)

    # A rank, as the stage loop is: it looks ahead before each item, and not while it is at one.

    def step(self, rank: SymbolicRank) -> bool:
        """Let a rank do its next action, if it can."""
        if rank.script is None:
            self.look_ahead(rank)
            if not rank.ahead:
                return False
            rank.group, rank.script = rank.ahead.popleft()
            rank.due.extend(rank.script.run)
            if rank.group.request not in rank.states:  # it has ended here
                rank.due.clear()
        elif rank.due:
            if not self.act(rank, rank.due[0]):
                return False
            rank.due.popleft()
        if not rank.due:
            rank.script = None
        return True

    def look_ahead(self, rank: SymbolicRank) -> None:
        while len(rank.ahead) < RECEIVES_AHEAD and (rank.coming or rank.inbox):
            if rank.coming:
                group, script = rank.coming.popleft()
                rank.ahead.append((group, script))
                for post in script.ahead:
                    self.posted[post.edge].append((group.request, named(post)))
                continue
            message = rank.inbox.popleft()
            if isinstance(message, Job):
                rank.admit(message)
            elif message.request in rank.states and message.kind is Kind.DROP:
                rank.coming.append((message, rank.drops[message.request]))
            elif message.request in rank.states:
                scripts = rank.scripts[message.request].get(message._replace(request=0), ())
                rank.coming.extend((message, script) for script in scripts)

    def act(self, rank: SymbolicRank, action: Action) -> bool:
        match action:
            case Post():
                self.posted[action.edge].append(rank.name(action))
            case Send():
                posted = self.posted[action.edge]
                if not posted:
                    return False
                name = rank.name(action)
                demand(posted[0] == name, action.edge, "expects", posted[0], "and is sent", name)
                self.here[posted.popleft()] = rank.give(action.value, action.item)
            case Wait():
                if (name := rank.name(action)) not in self.here:
                    return False
                rank.take(action.value, action.item, self.here.pop(name))
            case Keep():
                rank.take(action.value, action.item, rank.give(action.value, action.item))
                rank.state.waited[action.item, action.value] = None  # no buffer is lent
            case Free():
                rank.free(action)
            case Meet():
                return self.meet(rank, action)
            case Compute():
                rank.compute(rank.item, action.starts, action.ends)
            case Do.FINISH:
                rank.finish(rank.item)
            case Do.BEGUN:
                self.words[rank.number].append((action, rank.group))
            case Do.DONE | Do.MOVES:
                if rank.group.kind is not Kind.DROP:
                    rank.answer(rank.group)
                self.words[rank.number].append((action, rank.group))
            case Do.DENOISED:
                rank.state.denoised = True
            case Do.FORGET:
                rank.forget(rank.group.request, rank.group.kind is Kind.DROP)
        return True

    def meet(self, rank: SymbolicRank, meeting: Meet) -> bool:
        here = rank.group.request, meeting
        if (rank.number, *here) not in self.met:
            self.met.add((rank.number, *here))
            self.meetings[here] += 1
        return self.meetings[here] == len(meeting.ranks)

    def check_end(self) -> None:
        stuck = [(rank.number, rank.item, rank.due[0]) for rank in self.ranks if rank.script]
        demand(not stuck, "deadlock:", stuck)
        demand(not self.scheduler._active, "never let go:", self.scheduler._active)
        demand(self.finished == set(range(len(self.plan.jobs))) - self.cancelled, "not finished:", self.left)
        for rank in self.ranks:
            demand(not rank.states, "rank", rank.number, "keeps", set(rank.states))
            for one in (one for one in self.plan.jobs if one.id in self.finished):
                self.check_computed(rank, self.ranks[0].jobs[one.id])
        for edge, posted in self.posted.items():
            demand(not posted, "receives that nobody sends for, over", edge, posted)
        unread = [name for name in self.here if name[0] in self.finished]
        demand(not unread, "sent, and never taken:", unread)

    @property
    def cancelled(self) -> set[int]:
        return set(range(len(self.plan.jobs))) - self.finished - self.left

    def check_computed(self, rank: SymbolicRank, one: Job) -> None:
        """Each rank has run all of its part, once."""
        parallel, place = self.plan.parallel, rank.place
        wanted = set()
        if place.cfg < one.branches:
            branches = [Branch(place.cfg)] if parallel.cfg == 2 else list(Branch)[: one.branches]
            wanted |= {WorkItem(Kind.ENCODE, one.id)}
            if one.texts and place.is_first_lane and place.pp in rank.texts:
                wanted |= {text_item(self.plan, one, branch) for branch in branches if branch in one.shape.texts}
            groups = parallel.groups
            for step, expert in list(enumerate(self.plan.experts(one)))[one.first_step :]:
                stages = groups[expert if len(groups) == 2 else 0]
                if place.pp in stages and (step not in one.skipped or place.pp == stages[-1]):
                    own = set(branches) & set(branches_of(one, expert))
                    wanted |= {WorkItem(Kind.DENOISE, one.id, step, branch) for branch in own}
            if place == Place(pp=place.pp) and place.pp in rank.decoding:
                wanted |= {WorkItem(Kind.DECODE, one.id, chunk) for chunk in range(one.chunks)}
        found = {item for item in rank.computed if item.request == one.id}
        demand(found == wanted, "rank", rank.number, "computed", found ^ wanted)


def branches_of(one: Job, expert: int) -> list[Branch]:
    """The forwards of a step."""
    return [Branch.COND] if expert in one.unguided else list(Branch)[: one.branches]


def route(parallel: ParallelConfig, expert: int) -> range:
    """The stages of an expert's steps: all, or its own."""
    if parallel.expert_placement == "shared":
        return range(parallel.pp)
    high = parallel.high_stages
    assert high is not None
    return range(high, parallel.pp) if expert else range(high)


def crossed(parallel: ParallelConfig, one: Job, experts: list[int], step: int) -> range:
    """The stages that a step's items cross: of a skipped one the last alone."""
    stages = route(parallel, experts[step])
    return range(stages[-1], stages[-1] + 1) if step in one.skipped else stages


def named(message: Message) -> Message:
    """As both ends call it."""
    return Message(message.edge, message.item, message.value)

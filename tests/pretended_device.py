"""An accelerator that is pretended on a CPU build of torch: true values, CUDA's rules.

A tensor of the device wraps one of the CPU, which an operator computes with at once; so values are right whatever a
program does, and what would have gone wrong on a device is found from the order that it has asked for. Three things
are kept:

- vector clocks (Fidge 1988, Mattern 1989) of the host, the streams and the communicators: two accesses to the same
  memory, one of them a write, that nothing orders are a race. Events order streams and host, a communicator begins
  after the stream that it was called from, and a wait for its work joins the current stream, as NCCL's does. Host
  memory that an asynchronous copy uses takes part, and so does memory that is freed while another stream uses it;
- the host's stops: whatever waits for all that the current stream has to do, with its place in the source;
- a pretended time: each kernel takes as long as it is told to, the host takes none.

Operators that would need all their tensors on the device refuse others, as CUDA's do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from pretended_machine import HOST_MEMORY, MACHINE, Event, Memory, Stream, host_memory, host_reads, place
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "pretend"

SHAPES_ONLY = ("new_", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like")
"""How operators' names begin that look at no values of what they are given."""

INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")
"""These take indices from the host, and copy them."""

STOPPING = {
    "aten::_local_scalar_dense": "item",
    "aten::_linalg_check_errors": "check of a solution",
    "aten::equal": "equal",
    "aten::masked_select": "masked_select",
    "aten::nonzero": "nonzero",
    "aten::_unique2": "unique",
    "aten::unique_dim": "unique",
}
"""Operators whose result, or its shape, the host waits for."""

NO_SCALARS = ("stack", "cat", "mm", "bmm", "addmm", "convolution", "native_layer_norm", "gather", "index_select")
"""Operators that take not even a single number of the host."""


class DeviceTensor(Tensor):
    """A tensor of the device.

    Attributes:
        inner: its values. memory: shared with its views.
    """

    inner: Tensor  # type: ignore[assignment]  # a product of vectors has that name in torch
    memory: Memory

    @staticmethod
    def __new__(cls, inner: Tensor, memory: Memory) -> DeviceTensor:
        made: DeviceTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, torch.accelerator.current_device_index()),
        )
        made.inner, made.memory = inner, memory
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's says that it is a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def tolist(self) -> Any:
        MACHINE.stop("tolist")
        return self.inner.tolist()

    def record_stream(self, stream: Any) -> None:
        self.memory.lent.add(stream.actor.name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        MACHINE.stop("save")
        return self.inner.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]  # torch's


def on_device(inner: Tensor, what: str) -> DeviceTensor:
    """New memory of the device with these values, which the current stream writes."""
    memory = Memory(MACHINE.current)
    memory.write(MACHINE.current, what)
    return DeviceTensor(inner, memory)


def inner(value: Any) -> Any:
    """The same with CPU tensors for those of the device."""
    if isinstance(value, DeviceTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)(map(inner, value))
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


@dataclass(frozen=True)
class _Use:
    """What an operator does with an argument."""

    name: str
    position: int | None
    reads: bool
    writes: bool


@cache
def _uses(func: Any) -> tuple[_Use, ...]:
    """By the operator's schema; what is only viewed is not used."""
    name = func._schema.name.partition("::")[2]
    uses = []
    for position, argument in enumerate(func._schema.arguments):
        alias = argument.alias_info
        writes = alias is not None and alias.is_write
        reads = alias is None and not name.startswith(SHAPES_ONLY)
        uses.append(_Use(argument.name, None if argument.kwarg_only else position, reads, writes))
    return tuple(use for use in uses if use.reads or use.writes)


def _used(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[_Use, Tensor]]:
    for use in _uses(func):
        given = args[use.position] if use.position is not None and use.position < len(args) else kwargs.get(use.name)
        if isinstance(given, (Tensor, list, tuple)):
            for tensor in tensors_in((given,)):
                yield use, tensor


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator, wherever its tensors are."""
    given = list(tensors_in((*args, *kwargs.values())))
    ours = [tensor for tensor in given if isinstance(tensor, DeviceTensor)]
    device = kwargs.get("device")
    to_device = torch.device(device).type == NAME if device is not None else bool(ours)
    if not ours and not to_device:
        return _on_host(func, args, kwargs)
    name = func._schema.name
    if name in ("aten::_to_copy", "aten::copy_"):
        source, target = (args[0], to_device) if name == "aten::_to_copy" else (args[1], args[0])
        into = target if isinstance(target, bool) else isinstance(target, DeviceTensor)
        if isinstance(source, DeviceTensor) != into and source.device.type != "meta":
            return _across(func, args, kwargs, into)
    if kwargs.get("pin_memory") or (ours and not to_device):
        return _on_host(func, inner(args), {key: inner(value) for key, value in kwargs.items()})
    _check_devices(name, args, given)
    return _on_stream(func, args, kwargs)


def _on_host(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator of the host, at once."""
    pinned = kwargs.get("pin_memory")
    if HOST_MEMORY and func.namespace == "aten":  # what communicators do is not the host's
        MACHINE.host.tick()
        for use, tensor in _used(func, args, kwargs):
            if memory := host_memory(tensor, known_only=True):
                (memory.write if use.writes else memory.read)(MACHINE.host, func._schema.name)
    made = func(*args, **(kwargs | {"pin_memory": False} if pinned else kwargs))
    if pinned:
        memory = host_memory(made)
        assert memory is not None
        memory.pinned = True
    return made


def _across(func: Any, args: Any, kwargs: dict[str, Any], to_device: bool) -> Any:
    """A copy between host and device: at once, or where the host's memory is pinned, when the stream gets there."""
    plain = {key: inner(value) for key, value in kwargs.items()}
    what = "copy to the device" if to_device else "copy to the host"
    is_new = func._schema.name == "aten::_to_copy"
    hosts = (args[0] if is_new else args[1]) if to_device else (None if is_new else args[0])
    memory = None if hosts is None else host_memory(hosts, known_only=True)
    waits = not (kwargs.get("non_blocking") or args[2:3] == (True,)) or memory is None or not memory.pinned
    MACHINE.begin(MACHINE.current)
    MACHINE.current.free_ns += MACHINE.kernel_ns
    if memory is not None:
        (memory.read if to_device else memory.write)(MACHINE.current, what)
    for tensor in tensors_in(args):
        if isinstance(tensor, DeviceTensor):
            (tensor.memory.write if to_device else tensor.memory.read)(MACHINE.current, what)
    made = func(*inner(args), **plain)
    if waits:
        MACHINE.stop(what)
    if not is_new:
        return args[0]
    return on_device(made, what) if to_device else made


def _check_devices(name: str, args: Any, given: list[Tensor]) -> None:
    """Refuse an operator's mixed tensors, where CUDA's does."""
    hosts = [tensor for tensor in given if not isinstance(tensor, DeviceTensor) and tensor.device.type != "meta"]
    short = name.partition("::")[2]
    if name in INDEXING and isinstance(args[0], DeviceTensor):
        fills = name != "aten::index" and args[2].numel() == 1  # which torch makes a masked_fill of
        for index in tensors_in(args[1]):
            if index.dtype in (torch.bool, torch.uint8) and not fills:
                MACHINE.stop("indexing with a mask")
            if not isinstance(index, DeviceTensor):
                MACHINE.stop("copy of an index")
    elif not short.startswith(("copy_", *SHAPES_ONLY)):
        for tensor in hosts:
            if tensor.dim() or short in NO_SCALARS:
                found = f"{short} is given one of cpu, {list(tensor.shape)}, at {place()}"
                raise RuntimeError(f"Expected all tensors to be on the same device, but {found}.")


def _on_stream(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """An operator that the current stream gets to do."""
    name, stream = func._schema.name, MACHINE.current
    MACHINE.begin(stream)
    stream.free_ns += MACHINE.attention_ns if "attention" in name else MACHINE.kernel_ns
    for use, tensor in _used(func, args, kwargs):
        if isinstance(tensor, DeviceTensor):
            (tensor.memory.write if use.writes else tensor.memory.read)(stream, name)
    if name in STOPPING:
        MACHINE.stop(STOPPING[name])
    found = _attention(func, inner(args)) or func(*inner(args), **{key: inner(each) for key, each in kwargs.items()})
    ours = [tensor for tensor in tensors_in((*args, *kwargs.values())) if isinstance(tensor, DeviceTensor)]
    return _wrapped(found, {id(each.inner): each for each in ours}, name)


def _attention(func: Any, args: Any) -> Any:
    """The CPU's kernel in place of the device's, with as many results; None where it is something else."""
    if not func._schema.name.startswith("aten::_scaled_dot_product"):
        return None
    found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])
    others = func._schema.returns[2:]
    return (*found, *(torch.empty(0) if each.type.kind() == "TensorType" else 0 for each in others))


def _wrapped(found: Any, given: dict[int, DeviceTensor], what: str) -> Any:
    """What an operator has made, as tensors of the device: the same as were given, views of them, or new ones."""
    if isinstance(found, (list, tuple)):
        return type(found)(_wrapped(each, given, what) for each in found)
    if not isinstance(found, Tensor):
        return found
    if id(found) in given:
        return given[id(found)]
    storage = found.untyped_storage()._cdata
    for tensor in given.values():
        if tensor.inner.untyped_storage()._cdata == storage:
            return DeviceTensor(found, tensor.memory)
    return on_device(found, what)


class Dispatch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's
    """Sees every operator, also those that are given no tensors of the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def install(index: int, devices: int) -> None:
    """Make the device torch's accelerator in this process, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    attention, numpy, load = torch.nn.functional.scaled_dot_product_attention, Tensor.numpy, torch.load

    def on_one_kernel(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        # torch would ask this device's own backend which kernel it has.
        masks = [mask for mask in (*args, kwargs.get("attn_mask")) if isinstance(mask, Tensor)]
        given = [query, key, value, *masks]
        if not any(isinstance(tensor, DeviceTensor) for tensor in given):
            return attention(query, key, value, *args, **kwargs)
        _check_devices("aten::attention", (), given)
        MACHINE.begin(MACHINE.current)
        MACHINE.current.free_ns += MACHINE.attention_ns
        for tensor in given:
            assert isinstance(tensor, DeviceTensor)
            tensor.memory.read(MACHINE.current, "attention")
        plain = {name: inner(each) for name, each in kwargs.items()}
        return on_device(attention(*inner((query, key, value, *args)), **plain), "attention")

    def to_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        host_reads(tensor, "numpy")
        return numpy(tensor, *args, **kwargs)

    def load_onto(file: Any, map_location: Any = None, **options: Any) -> Any:
        loaded = load(file, **options)
        return torch.utils._pytree.tree_map_only(Tensor, partial(Tensor.to, device=map_location), loaded)

    changed: dict[Any, dict[str, Any]] = {
        torch.nn.functional: {"scaled_dot_product_attention": on_one_kernel},
        torch.Tensor: {"numpy": to_numpy},
        torch: {"Stream": Stream, "Event": Event, "load": load_onto},
        torch.accelerator: {
            "current_accelerator": lambda check_available=False: torch.device(NAME),
            "device_count": lambda: devices,
            "set_device_index": lambda device: None,
            "current_device_index": lambda: index % devices,
            "current_stream": lambda device=None: Stream(actor=MACHINE.current),
            "synchronize": lambda device=None: MACHINE.drain(),
        },
    }
    for owner, names in changed.items():
        for name, value in names.items():
            setattr(owner, name, value)
    Dispatch().__enter__()  # type: ignore[no-untyped-call]  # torch's

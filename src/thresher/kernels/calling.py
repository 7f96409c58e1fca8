"""Call the functions of a library with one struct, whose fields C++ and Python both name.

C++ lists the fields of a struct once (`csrc/arguments.h`), and the library describes their names, types, offsets and
sizes. From this description Python builds the same struct, checks that its memory layout agrees with C++, and fills it
by name. A new field takes one line in C++ and one keyword in Python, in any order.
"""

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from thresher.kernels.build import KernelError, load_library

Value = Tensor | int | float | None
NUMBERS: dict[str, type] = {"int64": ctypes.c_int64, "float64": ctypes.c_double}
NAMES = {
    getattr(torch, name): name for name in ("bool", "int8", "int16", "int32", "int64", "bfloat16", "float32", "float64")
}
ELEMENTS = {f"{name}*": dtype for dtype, name in NAMES.items()}


class Field(NamedTuple):
    """A field of a struct, as the library describes it.

    Attributes:
        name: Name.
        kind: "int64", "float64", or the element type of a tensor with a star: "float32*".
        offset: Offset in bytes.
        size: Size in bytes.
    """

    name: str
    kind: str
    offset: int
    size: int


class Struct:
    """The struct of arguments of a library function, filled by name.

    Args:
        function: Name of the function, for messages.
        description: A line for each field with name, kind, offset and size; the last line is the size of the struct.

    Raises:
        KernelError: A field has an unknown kind, or its offset differs between C++ and Python.
    """

    def __init__(self, function: str, description: str) -> None:
        *lines, size = description.splitlines()
        self.function = function
        self.fields = [Field(name, kind, int(at), int(length)) for name, kind, at, length in map(str.split, lines)]
        for field in self.fields:
            if field.kind not in ELEMENTS and field.kind not in NUMBERS:
                known = ", ".join((*NUMBERS, *ELEMENTS))
                raise KernelError(f"{function}: the field {field.name} has the type {field.kind}; known are {known}")
        types = [(f.name, NUMBERS.get(f.kind, ctypes.c_void_p)) for f in self.fields]
        self.layout: type[ctypes.Structure] = type("Layout", (ctypes.Structure,), {"_fields_": types})
        self._check_layout(int(size))
        self.elements = {f.name: ELEMENTS.get(f.kind) for f in self.fields}

    def fill(self, values: Mapping[str, Value]) -> ctypes.Structure:
        """Fill the struct; a tensor is passed by its address, None as a null pointer.

        Raises:
            KernelError: A field has no value, a value has no field, or a value does not fit its field.
        """
        elements = self.elements
        if values.keys() != elements.keys():
            raise KernelError(f"{self.function}: {self._describe_differences(values)}")
        passed: dict[str, int | float | None] = {}
        for name, x in values.items():
            if isinstance(x, Tensor):
                if x.dtype is not elements[name] or not x.is_contiguous():
                    raise self._build_error(name, x)
                passed[name] = x.data_ptr()
            elif x is not None and elements[name] is not None:
                raise self._build_error(name, x)
            else:
                passed[name] = x
        try:
            return self.layout(**passed)
        except TypeError as error:
            wrong = next(f.name for f in self.fields if not _fits(f, passed[f.name]))
            raise self._build_error(wrong, values[wrong]) from error

    def _check_layout(self, size: int) -> None:
        for field in self.fields:
            ours = getattr(self.layout, field.name)
            if (ours.offset, ours.size) != (field.offset, field.size):
                raise KernelError(
                    f"{self.function}: the field {field.name} has {field.size} bytes at byte {field.offset} in C++, "
                    f"but {ours.size} bytes at byte {ours.offset} in Python; list all fields in the order of the struct"
                )
        if ctypes.sizeof(self.layout) != size:
            last = self.fields[-1].name if self.fields else "none"
            raise KernelError(
                f"{self.function}: the struct has {size} bytes in C++, but its listed fields, the last of which is "
                f"{last}, end at byte {ctypes.sizeof(self.layout)}; list every field"
            )

    def _describe_differences(self, values: Mapping[str, Value]) -> str:
        missing = [name for name in self.elements if name not in values]
        unknown = [name for name in values if name not in self.elements]
        parts = [f"no value for the field {', '.join(missing)}"] * bool(missing)
        parts += [f"no field for the value {', '.join(unknown)}"] * bool(unknown)
        return f"{'; '.join(parts)} (the fields are {', '.join(self.elements)})"

    def _build_error(self, name: str, x: Value) -> KernelError:
        kind = next(f.kind for f in self.fields if f.name == name)
        wanted = f"a contiguous tensor of {kind[:-1]}" if kind in ELEMENTS else f"a number ({kind})"
        strides = "" if not isinstance(x, Tensor) or x.is_contiguous() else ", not contiguous"
        given = f"a tensor of {NAMES.get(x.dtype, x.dtype)}{strides}" if isinstance(x, Tensor) else repr(x)
        return KernelError(f"{self.function}: the field {name} holds {wanted}, not {given}")


def call(kernel: str, function: str, dtype: torch.dtype, **fields: Value) -> None:
    """Call `<function>_<dtype>` of the library `kernel`; the field `threads` is torch's number of threads.

    Args:
        kernel: Name of the library.
        function: Name of the function.
        dtype: Element type of the function.
        **fields: A value for each field of the function's struct.

    Raises:
        KernelError: The library cannot be built or loaded, it lacks the function, or a value does not fit its field.
    """
    run, struct = _load_function(load_library(kernel), kernel, f"{function}_{NAMES.get(dtype, dtype)}")
    fields["threads"] = torch.get_num_threads()
    run(ctypes.byref(struct.fill(fields)))


@functools.cache
def _load_function(loaded: ctypes.CDLL, kernel: str, name: str) -> tuple[Callable[..., None], Struct]:
    try:
        run, describe = loaded[name], loaded[f"describe_{name}"]
    except AttributeError as error:
        raise KernelError(f"the kernel {kernel} has no function {name}: export it in {kernel}.cpp") from error
    run.restype, describe.restype = None, ctypes.c_char_p
    return run, Struct(f"{kernel}: {name}", describe().decode())


def _fits(field: Field, x: int | float | None) -> bool:
    wanted = {"int64": int, "float64": (int, float)}.get(field.kind)
    return wanted is None or isinstance(x, wanted)  # type: ignore[arg-type]


def unify_types(*inputs: Tensor) -> tuple[Tensor, ...]:
    """Convert queries, keys and values to one type that operators read; fp16 becomes fp32."""
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in inputs))
    return tuple(x.to(torch.float32 if dtype == torch.float16 else dtype) for x in inputs)


def choose_sum_dtype(x: Tensor) -> torch.dtype:
    """Choose the type of sums over elements of `x`: fp32 for bf16, its own type otherwise."""
    return torch.float32 if x.dtype == torch.bfloat16 else x.dtype

"""A machine for the pickles that MXNet writes: it produces plain values and placeholders, and nothing else.

Whatever a file names, no module is imported, no class is looked up and no function is called: a table below lists the names
that MXNet's files contain, and what this machine makes of each. All others, and all instructions that MXNet's files never
contain, are refused. Long bytes stay in the file, as `Blob`.
"""
import codecs
import io
import re
import struct
from typing import Any, Callable, Collection, List, Mapping, NoReturn, Optional, Tuple, Union

import numpy

from ..errors import UnreadableFile
from ..file_part import FilePart
from .ndarray_format import MAX_ARRAYS, read_ndarray

__all__ = ['Array', 'Blob', 'Machine', 'Name', 'Object', 'load']

MAX_STEPS = 500_000  # about 25 000 arrays, which take half a second
MAX_STACK = 10_000  # pickle itself empties its stack after every 1000 items
MAX_TEXT = 1 << 16
MAX_LINE = 1 << 12
OBJECT_SIZE, NUMBER_SIZE = 100, 40  # bytes of memory, roughly

NAMES = {
    'mxnet.ndarray.NDArray': 'array', 'mxnet.ndarray.ndarray.NDArray': 'array', 'mxnet.numpy.multiarray.ndarray': 'array',
    'mxnet.ndarray.sparse.RowSparseNDArray': 'array', 'mxnet.ndarray.sparse.CSRNDArray': 'array',
    'builtins.bytearray': 'bytearray', '__builtin__.bytearray': 'bytearray', '_codecs.encode': 'encode',
    'builtins.object': 'object', '__builtin__.object': 'object',
    'copyreg._reconstructor': 'instance', 'copy_reg._reconstructor': 'instance',
    'gluon_optim.mxnet.registry._restore': 'user optimizer',
    'numpy.dtype': 'dtype', 'numpy.core.multiarray.scalar': 'scalar', 'numpy._core.multiarray.scalar': 'scalar',
}
CLASS_PATHS = re.compile(
    r'mxnet\.optimizer(\.[A-Za-z]+)?\.(SGD|ccSGD|NAG|Signum|LARS|LBSGD|DCASGD|SGLD|Adam|AdamW|Adamax|Nadam|AdaBelief|LAMB|LANS|FTML|Ftrl'
    r'|AdaGrad|GroupAdaGrad|AdaDelta|RMSProp|Test)|mxnet\.lr_scheduler\.((Factor|MultiFactor|Poly|Cosine)Scheduler|LRScheduler)'
    r'|gluon_optim(\.[A-Za-z_]\w*)+', re.ASCII)
NUMBER_TYPES = {'f2', 'f4', 'f8', 'i1', 'i2', 'i4', 'i8', 'u1', 'u2', 'u4', 'u8', 'b1'}


class Blob:
    """Bytes that stay in the file until needed, or text with its ``codec``, which can represent bytes (``is_bytes``)."""

    __slots__ = ('begin', 'size', 'codec', 'is_bytes')

    def __init__(self, begin: int, size: int, codec: str, is_bytes: bool):
        self.begin, self.size, self.codec, self.is_bytes = begin, size, codec, is_bytes


class Name:
    """Something the file refers to by import path; ``kind`` is one from `NAMES`, or 'class'."""

    __slots__ = ('path', 'kind')

    def __init__(self, path: str, kind: str):
        self.path, self.kind = path, kind


class Object:
    """Placeholder for an instance of the class at ``path``; ``attributes`` are those that the file gives it."""

    __slots__ = ('path', 'attributes')

    def __init__(self, path: str):
        self.path, self.attributes = path, None  # type: str, Any


class NumberType:
    """Placeholder for a numpy.dtype."""

    __slots__ = ('code', 'order')

    def __init__(self, code: str):
        self.code, self.order = code, '<'


class Array:
    """Placeholder for an NDArray."""

    __slots__ = ('machine', 'content')

    def __init__(self, machine: 'Machine'):
        self.machine, self.content = machine, None  # type: Machine, Any

    def read(self) -> numpy.ndarray:
        """The array itself, decoded now."""
        return self.machine.decode(self.content)


def load(source: FilePart, allow: Collection[str] = ()) -> Any:
    """The value of the pickle in ``source``: None, bool, int, float, str, list, tuple, dict, `Array` and `Object`.

    Further classes, besides MXNet's and ours, can be named in ``allow``; they also become `Object`.
    """
    return Machine(source, allow).run()


class Machine:
    """What carries out a pickle. One for the files of another program has other tables, and other makers of values."""

    origin = 'MXNet'
    max_steps = MAX_STEPS
    names: Mapping[str, str] = NAMES
    calls: Mapping[str, Callable[[Any, Tuple[Any, ...]], Any]]           # set below, as are
    instructions: Mapping[bytes, Callable[[Any], None]]

    def __init__(self, source: FilePart, allow: Collection[str]):
        self.source, self.allow = source, frozenset(allow)
        self.file, self.allowance = source.file, source.allowance
        self.stack: List[Any] = []
        self.marks: List[int] = []
        self.bottom = 0  # anything below the last mark is out of reach
        self.memo: List[Any] = []
        self.decoded = 0

    def run(self, alone: bool = True) -> Any:
        """The value of the pickle that begins here, which must be ``alone`` in its part of the file."""
        read, instructions = self.file.read, self.instructions
        begin = self.source.at()
        for _ in range(self.max_steps):
            code = read(1)
            if code == b'.':
                break
            instruction = instructions.get(code)
            if instruction is None:
                self._unknown(code)
            try:
                instruction(self)
            except UnreadableFile:
                raise
            except (ValueError, IndexError, OverflowError, struct.error) as error:  # UnicodeDecodeError is a ValueError
                self.fail(f'the pickle instruction {code!r} cannot be executed here ({type(error).__name__}).')
        else:
            self.fail(f'the pickle has more than {self.max_steps} instructions.')
        if len(self.stack) != 1 or self.marks:
            self.fail('the pickle ends in the middle of a value.')
        if alone and self.source.left():
            self.fail(f'{self.source.left()} bytes follow the end of the pickle, which started at {begin}.')
        return self.stack.pop()

    def fail(self, message: str) -> NoReturn:
        self.source.fail(message)

    def _unknown(self, code: bytes) -> NoReturn:
        if not code:
            self.fail('the pickle is truncated.')
        self.fail(f'{REFUSED.get(code, "this is not a pickle instruction")} ({code!r}), which no file of {self.origin} '
                  'contains. Nothing was imported or run.')

    # -- stack ------------------------------------------------------------------------------------------------------

    def push(self, value: Any, size: int = 0) -> None:
        stack = self.stack
        if len(stack) >= MAX_STACK:
            self.fail(f'the pickle keeps more than {MAX_STACK} values open.')
        if size:
            self.charge(size)
        stack.append(value)

    def charge(self, size: int) -> None:
        if self.allowance.left < size:
            self.source.charge(size)  # this fails
        self.allowance.left -= size

    def pop(self) -> Any:
        stack = self.stack
        if len(stack) <= self.bottom:
            self.fail('a pickle instruction is missing its values.')
        return stack.pop()

    def pop_mark(self) -> List[Any]:
        begin = self.marks.pop()
        self.bottom = self.marks[-1] if self.marks else 0
        items = self.stack[begin:]
        del self.stack[begin:]
        return items

    def last(self) -> Any:
        """The last value, left on the stack."""
        if len(self.stack) <= self.bottom:
            self.fail('a pickle instruction is missing its values.')
        return self.stack[-1]

    def container(self, kind: type) -> Any:
        """The last value, left on the stack, which must be a list or a dictionary."""
        value = self.last()
        if type(value) is not kind:
            self.fail(f'a pickle instruction for {kind.__name__}s got something else.')
        return value

    def mark(self) -> None:
        self.bottom = len(self.stack)
        self.marks.append(self.bottom)

    # -- the contents of the file --------------------------------------------------------------------------------------

    def number(self, layout: struct.Struct) -> Any:
        data = self.file.read(layout.size)
        if len(data) != layout.size:
            self.fail('the pickle is truncated.')
        return layout.unpack(data)[0]

    def line(self) -> bytes:
        """A line without its end: a number, a name or a quoted string."""
        line = self.file.readline(MAX_LINE)
        if line[-1:] != b'\n':
            self.fail('a line of the pickle is truncated, or too long.')
        return line[:-1]

    def integer(self) -> None:
        line = self.line()
        if line in (b'00', b'01'):
            self.push(line == b'01')
        elif re.fullmatch(rb'-?\d{1,20}L?', line):
            self.push(int(line.rstrip(b'L')), NUMBER_SIZE)
        else:
            self.fail('an integer of the pickle is malformed, or too long.')

    def long(self) -> None:
        size = self.number(B)
        if size > 8:  # among wider ones, so many share a hash that a dictionary takes hours
            self.fail(f'an integer of {size} bytes.')
        self.push(int.from_bytes(self.source.take(size, 'an integer'), 'little', signed=True), NUMBER_SIZE)

    def skip(self, size: int, codec: str) -> None:
        """Leave ``size`` bytes unread in the file."""
        self.source.need(size, 'a string of the pickle')
        begin = self.source.at()
        self.file.seek(begin + size)
        self.push(Blob(begin, size, codec, not codec), OBJECT_SIZE)

    def text(self, size: int, codec: str) -> None:
        if size > MAX_TEXT:
            self.skip(size, codec)
        else:
            self.push_text(self.source.take(size, 'a string of the pickle').decode(codec))

    def push_text(self, text: str) -> None:
        self.push(text, OBJECT_SIZE + (1 if text.isascii() else 4) * len(text))

    def escaped_text(self) -> None:
        """A line of Python 2: text in which line ends and backslashes are escaped."""
        begin = self.source.at()
        line = self.file.readline()
        size = len(line) - 1
        if line[-1:] != b'\n':
            self.fail('a line of the pickle is truncated.')
        if size > MAX_TEXT:
            self.push(Blob(begin, size, 'raw-unicode-escape', False), OBJECT_SIZE)
        else:
            self.push_text(line[:-1].decode('raw-unicode-escape'))

    def quoted_text(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            self.fail('a quoted string of the pickle is malformed.')
        text: bytes = codecs.escape_decode(line[1:-1])[0]  # type: ignore[assignment,unused-ignore]  # typeshed once said str
        self.push_text(text.decode('latin-1'))

    def protocol(self) -> None:
        version = self.number(B)
        if not 2 <= version <= 5:
            self.fail(f'pickle protocol {version}; 2 to 5 can be read, and the older ones, which have no number.')

    def frame(self) -> None:
        self.source.need(self.number(Q), 'a frame of the pickle')

    # -- memo ---------------------------------------------------------------------------------------------------------

    def put(self, index: int) -> None:
        """Python counts upwards, from 0 or (Python 2) from 1."""
        memo, value = self.memo, self.last()
        self.charge(8)
        if index == len(memo):
            memo.append(value)
        elif 0 <= index < len(memo):
            memo[index] = value
        elif index == len(memo) + 1:
            memo.extend((_UNSET, value))
        else:
            self.fail(f'memo entry {index} follows {len(memo)}.')

    def get(self, index: int) -> None:
        value = self.memo[index] if 0 <= index < len(self.memo) else _UNSET
        if value is _UNSET:
            self.fail(f'memo entry {index} is not there.')
        self.push(value)

    # -- containers ---------------------------------------------------------------------------------------------------

    def pack(self, size: int) -> None:
        stack = self.stack
        begin = len(stack) - size
        if begin < self.bottom:
            self.fail('a pickle instruction is missing its values.')
        items = tuple(stack[begin:])
        del stack[begin:]
        self.push(items, OBJECT_SIZE)

    def extend(self, items: List[Any]) -> None:
        self.container(list).extend(items)

    def append(self) -> None:
        item = self.pop()
        self.container(list).append(item)

    def set_items(self, items: List[Any]) -> None:
        target = self.container(dict)
        if len(items) % 2:
            self.fail('a dictionary of the pickle has a key without a value.')
        for key, value in zip(items[::2], items[1::2]):
            if type(key) not in (str, int, bool):
                self.fail('the keys of a dictionary must be numbers or strings.')
            self.charge(NUMBER_SIZE)
            target[key] = value

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items([key, value])

    def whole_dict(self) -> None:
        items = self.pop_mark()
        self.push({}, 2 * OBJECT_SIZE)
        self.set_items(items)

    # -- names and objects ----------------------------------------------------------------------------------------------

    def name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str:
            self.fail('a name in the pickle must be a string.')
        path = f'{module}.{name}'
        kind = self.names.get(path) or self.kind_of_class(path)
        if not kind or '.' in name:
            self.fail_name(path[:200])
        self.push(Name(path, kind), OBJECT_SIZE)

    def kind_of_class(self, path: str) -> str:
        """What a name that is not in ``names`` means, '' where it is refused."""
        return 'class' if CLASS_PATHS.fullmatch(path) or path in self.allow else ''

    def fail_name(self, path: str) -> NoReturn:
        self.fail(f'the file names {path!r}, which is not among the optimizers, schedulers and arrays of MXNet. Nothing was '
                  f'imported or run. If it is a class of your own, pass allow=[{path!r}] to read its attributes; that does '
                  'not import it either.')

    def stack_name(self) -> None:
        name = self.pop()
        self.name(self.pop(), name)

    def call(self) -> None:
        """REDUCE: only for entries of `NAMES`, by functions of this machine, with the arguments found in honest files."""
        arguments, function = self.pop(), self.pop()
        if type(arguments) is not tuple or type(function) is not Name or function.kind not in self.calls:
            self.fail(f'the pickle calls something that no file of {self.origin} file calls. Nothing was run.')
        value = self.calls[function.kind](self, arguments)
        if value is None:
            self.fail(f'the pickle calls {function.path!r} with arguments that no file of {self.origin} file has. Nothing '
                      'was run.')
        self.push(value, OBJECT_SIZE)

    def make_array(self, arguments: Tuple[Any, ...]) -> Optional[Array]:
        return Array(self) if arguments == (None,) else None

    def make_bytes(self, arguments: Tuple[Any, ...]) -> Union[bytes, Blob, None]:
        """bytearray(b'...') of Python 3; bytearray(u'...', 'latin-1') and encode(u'...', 'latin1') of older protocols."""
        if not arguments:
            return b''
        text, codec = arguments[0], arguments[1:]
        encoded = codec in (('latin-1',), ('latin1',))
        if type(text) is str and encoded:
            return text.encode('latin-1')
        if type(text) is Blob and encoded and text.codec in WIDE and not text.is_bytes:
            return Blob(text.begin, text.size, text.codec, True)
        is_bytes = text.is_bytes if type(text) is Blob else type(text) is bytes
        return text if is_bytes and not codec else None

    def make_instance(self, arguments: Tuple[Any, ...]) -> Optional[Object]:
        if len(arguments) != 3 or [type(x) for x in arguments[:2]] != [Name, Name] or arguments[2] is not None:
            return None
        cls, base, _ = arguments
        return Object(cls.path) if (cls.kind, base.kind) == ('class', 'object') else None

    def make_user_optimizer(self, arguments: Tuple[Any, ...]) -> Optional[Object]:
        """The class that `go.register` makes from a user's rule is pickled as that rule."""
        if len(arguments) != 1 or type(arguments[0]) is not Name or arguments[0].kind != 'class':
            return None
        return Object(arguments[0].path)

    def make_number_type(self, arguments: Tuple[Any, ...]) -> Optional[NumberType]:
        code = arguments[0] if arguments else None
        return NumberType(code) if type(code) is str and code in NUMBER_TYPES else None

    def make_number(self, arguments: Tuple[Any, ...]) -> Union[int, float, bool, None]:
        if len(arguments) != 2 or type(arguments[0]) is not NumberType:
            return None
        number_type, data = arguments
        data = data.encode('latin-1') if type(data) is str else self.content(data)
        if len(data) != int(number_type.code[1]):
            return None
        number: Union[int, float, bool] = numpy.frombuffer(data, number_type.order + number_type.code)[0].item()
        return number

    def new_object(self) -> None:
        arguments, cls = self.pop(), self.pop()
        if arguments != () or type(cls) is not Name or cls.kind != 'class':
            self.fail('the pickle creates an object in a way no MXNet file does. Nothing was run.')
        self.push(Object(cls.path), OBJECT_SIZE)

    def build(self) -> None:
        state, target = self.pop(), self.pop()
        if (type(target) is Object and type(state) is dict and target.attributes is None
                and all(type(key) is str for key in state)):
            target.attributes = state
        elif type(target) is Array and type(state) is dict and list(state) == ['handle'] and target.content is None:
            target.content = state['handle']
        elif type(target) is NumberType and type(state) is tuple and len(state) > 1 and state[1] in ('<', '>', '|', '='):
            target.order = state[1]
        else:
            self.fail('the pickle gives an object a state that no MXNet file has.')
        self.stack.append(target)

    # -- bytes ----------------------------------------------------------------------------------------------------------

    def content(self, value: Any) -> bytes:
        """The bytes of a number."""
        if type(value) is Blob and not value.codec and value.size <= 8:
            position = self.source.at()
            value = self.source.part(value.begin, value.size).take(value.size, 'a number')
            self.file.seek(position)
        if type(value) is not bytes:
            self.fail('expected the bytes of a number here.')
        return value

    def decode(self, content: Union[Blob, bytes, None]) -> numpy.ndarray:
        """The array in the bytes of an NDArray's ``handle``."""
        self.decoded += 1
        if self.decoded > MAX_ARRAYS:
            self.fail(f'the file has more than {MAX_ARRAYS} arrays.')
        if type(content) is Blob and not content.codec:
            source = self.source.part(content.begin, content.size)
        elif type(content) is bytes or (type(content) is Blob and content.is_bytes):
            data = content if type(content) is bytes else self._encoded(content)  # type: ignore[arg-type]
            source = FilePart(io.BytesIO(data), f'{self.source.name}, an array in text form', 0, len(data), self.source.allowance)
        else:
            self.fail('an NDArray without data (its parameter was never initialized).')
        array = read_ndarray(source)
        if source.left():
            source.fail(f'{source.left()} bytes follow an array.')
        return array

    def _encoded(self, blob: Blob) -> bytes:
        data = self.source.part(blob.begin, blob.size).take(blob.size, 'an array in text form')
        if WIDE[blob.codec].search(data):  # before decoding: such characters take four bytes of memory each
            self.source.fail('an array in text form contains characters that do not represent a byte.', blob.begin)
        try:
            text = data.decode(blob.codec)
            del data
            return text.encode('latin-1')
        except ValueError:
            self.source.fail('an array in text form is malformed.', blob.begin)


_UNSET = object()
B, H, I, Q, INT, DOUBLE = map(struct.Struct, ('<B', '<H', '<I', '<Q', '<i', '>d'))
WIDE = {'raw-unicode-escape': re.compile(rb'\\u(?!00)|\\U(?!000000)'), 'utf-8': re.compile(rb'[\xc4-\xff]')}

Machine.calls = {
    'array': Machine.make_array, 'bytearray': Machine.make_bytes, 'encode': Machine.make_bytes,
    'instance': Machine.make_instance, 'user optimizer': Machine.make_user_optimizer,
    'dtype': Machine.make_number_type, 'scalar': Machine.make_number,
}

Machine.instructions = {
    b'\x80': Machine.protocol,
    b'\x95': Machine.frame,
    b'(': Machine.mark,
    b'N': lambda m: m.push(None),
    b'\x88': lambda m: m.push(True),
    b'\x89': lambda m: m.push(False),
    b'I': Machine.integer,
    b'L': Machine.integer,
    b'\x8a': Machine.long,
    b'J': lambda m: m.push(m.number(INT), NUMBER_SIZE),
    b'K': lambda m: m.push(m.number(B)),
    b'M': lambda m: m.push(m.number(H), NUMBER_SIZE),
    b'F': lambda m: m.push(float(m.line()), NUMBER_SIZE),
    b'G': lambda m: m.push(m.number(DOUBLE), NUMBER_SIZE),
    b'S': Machine.quoted_text,
    b'V': Machine.escaped_text,
    b'U': lambda m: m.text(m.number(B), 'latin-1'),
    b'T': lambda m: m.text(m.number(I), 'latin-1'),
    b'\x8c': lambda m: m.text(m.number(B), 'utf-8'),
    b'X': lambda m: m.text(m.number(I), 'utf-8'),
    b'\x8d': lambda m: m.text(m.number(Q), 'utf-8'),
    b'C': lambda m: m.skip(m.number(B), ''),
    b'B': lambda m: m.skip(m.number(I), ''),
    b'\x8e': lambda m: m.skip(m.number(Q), ''),
    b'\x96': lambda m: m.skip(m.number(Q), ''),
    b'p': lambda m: m.put(int(m.line())),
    b'q': lambda m: m.put(m.number(B)),
    b'r': lambda m: m.put(m.number(I)),
    b'\x94': lambda m: m.put(len(m.memo)),
    b'g': lambda m: m.get(int(m.line())),
    b'h': lambda m: m.get(m.number(B)),
    b'j': lambda m: m.get(m.number(I)),
    b')': lambda m: m.pack(0),
    b'\x85': lambda m: m.pack(1),
    b'\x86': lambda m: m.pack(2),
    b'\x87': lambda m: m.pack(3),
    b't': lambda m: m.push(tuple(m.pop_mark()), OBJECT_SIZE),
    b']': lambda m: m.push([], OBJECT_SIZE),
    b'l': lambda m: m.push(m.pop_mark(), OBJECT_SIZE),
    b'a': Machine.append,
    b'e': lambda m: m.extend(m.pop_mark()),
    b'}': lambda m: m.push({}, 2 * OBJECT_SIZE),
    b'd': Machine.whole_dict,
    b's': Machine.set_item,
    b'u': lambda m: m.set_items(m.pop_mark()),
    b'c': lambda m: m.name(m.line().decode(), m.line().decode()),
    b'\x93': Machine.stack_name,
    b'R': Machine.call,
    b'\x81': Machine.new_object,
    b'b': Machine.build,
}

REFUSED = {
    b'P': 'the pickle refers to a persistent id', b'Q': 'the pickle refers to a persistent id',
    b'\x82': 'the pickle uses the extension registry', b'\x83': 'the pickle uses the extension registry',
    b'\x84': 'the pickle uses the extension registry', b'i': 'the pickle creates an object by calling its class',
    b'o': 'the pickle creates an object by calling its class', b'\x92': 'the pickle creates an object with named arguments',
    b'\x97': 'the pickle uses memory outside the file', b'\x98': 'the pickle uses memory outside the file',
    b'\x8b': 'an integer of unlimited size', b'\x8f': 'a set', b'\x90': 'a set', b'\x91': 'a set',
    b'0': 'the pickle discards a value', b'1': 'the pickle discards values', b'2': 'the pickle doubles a value',
}

"""Pickles that would run code if anything loaded them: each would make a file ``canary``."""

import json
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from hostile import (
    Member,
    call,
    group,
    legacy_bytes,
    mapping,
    name,
    number,
    pickled,
    sizes,
    stack_name,
    storage,
    tensor,
    text,
    torch_bytes,
    torch_members,
    zip_bytes,
)

from faults.case import Build, Case, alone
from faults.corpus.numpy_files import npy
from faults.corpus.torch_files import (
    COMMAND,
    EVIL,
    EVIL_PICKLE,
    ORDER,
    VERSION,
    WEIGHTS,
    Make,
    Row,
    archive,
    both,
    in_archive,
    refused,
    tar_bytes,
    view,
)

HARM = "Whoever loads this pickle runs what its author chose."
PATH, MODE = text("canary"), text("w")
SOURCE = text("open('canary', 'w')")
WORDS = b"](" + text("touch") + PATH + b"e"
SYSTEM = name("os", "system")
NAMED = r"needs Python code 'os\.system'"


def cases() -> Sequence[Case]:
    """Return the cases of this module."""
    return [
        *refused("code", _functions() + _alike()),
        *refused("code-by", _operations() + _attributes()),
        *refused("code-in", _parts_of_a_tensor() + _members() + _legacy()),
        *refused("code-in-pickle", _plain_pickles(), "bad.pkl"),
        *refused("code-in-array", _arrays(), "bad.npz"),
        *_directories(),
        *_never_run(),
    ]


def _held(value: bytes) -> bytes:
    """Return a torch file that holds a value beside good weights."""
    return torch_bytes(mapping({"w": tensor(), "x": value}))


def _raw(content: bytes) -> bytes:
    """Push bytes."""
    return b"B" + struct.pack("<I", len(content)) + content


# name -> what it would be called with; a colon ends the module if an attribute's attribute is meant
FUNCTIONS: Mapping[str, Sequence[bytes]] = {
    # commands
    "os.system": [COMMAND],
    "posix.system": [COMMAND],
    "nt.system": [COMMAND],
    "os.popen": [COMMAND],
    "os.execlp": [text("touch"), text("touch"), PATH],
    "os.spawnlp": [number(0), text("touch"), text("touch"), PATH],
    "subprocess.Popen": [WORDS],
    "subprocess.run": [WORDS],
    "subprocess.check_output": [WORDS],
    "subprocess.getoutput": [COMMAND],
    "commands.getoutput": [COMMAND],
    "pty.spawn": [WORDS],
    "asyncio.create_subprocess_shell": [COMMAND],
    "multiprocessing.util.spawnv_passfds": [text("/usr/bin/touch"), WORDS, b")"],
    "distutils.spawn.spawn": [WORDS],
    "uuid._get_command_stdout": [text("touch"), PATH],
    "_osx_support._read_output": [COMMAND],
    "torch.utils.collect_env.run": [COMMAND],
    "numpy.distutils.exec_command.exec_command": [COMMAND],
    # Python
    "builtins.eval": [SOURCE],
    "builtins.exec": [SOURCE],
    "builtins.compile": [SOURCE, text("x"), text("exec")],
    "__builtin__.eval": [SOURCE],
    "__builtin__.execfile": [PATH],
    "builtins.getattr": [SYSTEM, text("__call__")],
    "builtins.setattr": [b"N", text("x"), b"N"],
    "builtins.__import__": [text("this")],
    "builtins.map": [SYSTEM, b"](" + COMMAND + b"e"],
    "builtins.type": [text("x"), b")", b"}"],
    "builtins.breakpoint": [],
    "importlib.import_module": [text("this")],
    "importlib.util.spec_from_file_location": [text("x"), PATH],
    "runpy._run_code": [SOURCE, b"}"],
    "runpy.run_path": [PATH],
    "timeit.timeit": [SOURCE],
    "timeit.main": [b"](" + SOURCE + b"e"],
    "code.interact": [],
    "codeop.compile_command": [SOURCE],
    "pdb.run": [SOURCE],
    "bdb:Bdb.run": [call(name("bdb", "Bdb")), SOURCE],
    "cProfile.run": [SOURCE],
    "profile.runctx": [SOURCE, b"}", b"}"],
    "trace:Trace.run": [b"N", SOURCE],
    "doctest.debug_script": [SOURCE],
    "idlelib.run:Executive.runcode": [b"N", SOURCE],
    "site.execsitecustomize": [],
    "pip.main": [b"](" + text("--version") + b"e"],
    # what calls something else
    "operator.attrgetter": [text("system")],
    "operator.methodcaller": [text("system"), COMMAND],
    "functools.partial": [SYSTEM, COMMAND],
    "functools.reduce": [SYSTEM, b"](" + COMMAND + b"e"],
    "itertools.starmap": [SYSTEM, b"](" + COMMAND + b"\x85e"],
    "types.FunctionType": [b"N", b"}"],
    "types.CodeType": [number(0)] * 16,
    "threading.Thread": [b"N", SYSTEM],
    "concurrent.futures.ThreadPoolExecutor": [],
    "atexit.register": [SYSTEM, COMMAND],
    "signal.signal": [number(10), SYSTEM],
    "weakref.finalize": [b"N", SYSTEM, COMMAND],
    "sys.setprofile": [SYSTEM],
    # loaders
    "pickle.loads": [_raw(EVIL_PICKLE)],
    "_pickle.loads": [_raw(EVIL_PICKLE)],
    "dill.loads": [_raw(EVIL_PICKLE)],
    "dill._dill._create_function": [b"N"],
    "cloudpickle.cloudpickle._make_function": [b"N"],
    "joblib.load": [PATH],
    "pandas.read_pickle": [PATH],
    "marshal.loads": [_raw(b"N")],
    "shelve.open": [PATH],
    "dbm.dumb.open": [PATH, MODE],
    "torch.load": [PATH],
    "torch.serialization.load": [PATH],
    "torch.storage._load_from_bytes": [_raw(b"")],
    "torch.hub.load": [text("."), PATH],
    "torch.jit.load": [PATH],
    "torch.jit.unsupported_tensor_ops.execWrapper": [SOURCE, b"}", b"}"],
    "torch.package.PackageImporter": [PATH],
    "torch._inductor.codecache.compile_file": [PATH, PATH, b"]"],
    "torch._dynamo.guards:GuardBuilder.get": [b"N", SOURCE],
    "torch.fx.graph_module.reduce_graph_module": [b"}", text("")],
    "torch.utils.bottleneck.__main__.run_cprofile": [SOURCE, b"}"],
    "torch.utils.cpp_extension.load_inline": [PATH, text("")],
    "torch.utils._config_module:ConfigModule.load_config": [b"N", _raw(EVIL_PICKLE)],
    "torch.distributed.rpc.internal._run_function": [b"N"],
    "numpy.load": [PATH],
    "numpy.f2py.crackfortran.getlincoef": [SOURCE, b"]"],
    "numpy.testing._private.utils.runstring": [SOURCE, b"}"],
    "ctypes.CDLL": [PATH],
    "logging.config.dictConfig": [mapping({"version": number(1)})],
    "zipimport.zipimporter": [PATH],
    "ckptavg.cli.run": [b"](" + text("--version") + b"e"],
    # files
    "builtins.open": [PATH, MODE],
    "io.open": [PATH, MODE],
    "_io.FileIO": [PATH, MODE],
    "os.mkdir": [PATH],
    "os.putenv": [text("PATH"), text("")],
    "shutil.copyfile": [text("good.safetensors"), PATH],
    "pathlib:Path.write_text": [call(name("pathlib", "PosixPath"), PATH), text("")],
    "pathlib:Path.touch": [call(name("pathlib", "PosixPath"), PATH)],
    "pathlib:Path.unlink": [call(name("pathlib", "PosixPath"), text("good.safetensors"))],
    "tempfile.NamedTemporaryFile": [],
    "logging.FileHandler": [PATH],
    "sqlite3.connect": [PATH],
    "gzip.open": [PATH, MODE],
    "zipfile.ZipFile": [PATH, MODE],
    "tarfile.open": [PATH, MODE],
    "torch.save": [b"N", PATH],
    "numpy.memmap": [PATH],
    # connections
    "socket.socket": [],
    "ssl.get_server_certificate": [group(text("localhost"), number(9))],
    "ftplib.FTP": [],
    "smtplib.SMTP": [],
    "http.client.HTTPConnection": [text("localhost")],
    "urllib.request.urlretrieve": [text("file:///dev/null"), PATH],
    "requests.get": [text("http://localhost:9")],
    "webbrowser.open": [text("about:blank")],
    "huggingface_hub.hf_hub_download": [text("x"), text("x")],
}


def _functions() -> list[Row]:
    rows = []
    for key, arguments in FUNCTIONS.items():
        module, _, attribute = key.rpartition(":" if ":" in key else ".")
        push = stack_name if "." in attribute else name  # GLOBAL follows no dots
        content, dotted = _held(call(push(module, attribute), *arguments)), key.replace(":", ".")
        rows.append((dotted, HARM, content, rf"needs Python code '{re.escape(dotted)}'"))
    return rows


def _alike() -> list[Row]:
    """Return names that are almost, but not quite, those that a checkpoint may hold."""
    needs = r"needs Python code"
    names = (
        ("homoglyph-of-os", "\u043es", "system", needs + " '\u043es\\.system'"),
        ("fullwidth-os", "\uff4f\uff53", "system", needs + " '\uff4f\uff53\\.system'"),
        ("homoglyph-of-collections", "c\u043ellections", "OrderedDict", needs),
        ("fullwidth-attribute", "collections", "\uff2frderedDict", needs),
        ("space-before", " collections", "OrderedDict", needs + r" ' collections\."),
        ("space-after", "collections", "OrderedDict ", needs + r" 'collections\.OrderedDict '"),
        ("upper-case", "COLLECTIONS", "OrderedDict", needs + r" 'COLLECTIONS\."),
        ("newline", "os\nsystem", "OrderedDict", needs + r" 'os\\nsystem\."),
        ("carriage-return", "os\r", "system", needs + r" 'os\\r\.system'"),
        ("NUL", "os\0", "system", needs + r" 'os\\x00\.system'"),
        ("escape-sequence", "\x1b[2Jos", "system", needs + r" '\\x1b\[2Jos\.system'"),
        ("right-to-left", "\u202eos", "system", needs + r" '\\u202eos\.system'"),
        ("zero-width-space", "torch._utils", "_rebuild_tensor_v2\u200b", needs),
        ("surrogate", "os\ud800", "system", needs),
        ("100-kB", "o" * 100_000, "system", needs),
        ("no-module", "", "system", needs + r" '\.system'"),
        ("no-attribute", "os", "", needs + r" 'os\.'"),
        ("dots-alone", "..", "..", needs),
        ("quotes", "os', which is harmless; '", "system", needs + r" 'os', which"),
        ("own-module", "__main__", "Model", needs + r" '__main__\.Model'"),
    )
    why = "A name that only looks like one that is known stands for something else."
    return [
        (f"name-{what}", why, _held(call(stack_name(module, attribute), COMMAND)), refusal)
        for what, module, attribute, refusal in names
    ]


def _operations() -> list[Row]:
    """Return all the ways in which a pickle machine comes to call something."""
    memoised = (
        text("system") + b"\x940" + text("os") + b"\x940"
        + b"h\x01h\x00\x93" + COMMAND + b"\x85R"
    )  # fmt: skip
    extension = r"operation 0x8{}"
    programs = (
        ("GLOBAL-and-REDUCE", EVIL, NAMED),
        ("STACK_GLOBAL", call(stack_name("os", "system"), COMMAND), NAMED),
        ("STACK_GLOBAL-of-memoised-texts", memoised, NAMED),
        ("STACK_GLOBAL-in-a-frame", b"\x95" + bytes(8) + call(stack_name("os", "system")), NAMED),
        ("GLOBAL-out-of-the-memo", SYSTEM + b"q\x000h\x00" + COMMAND + b"\x85R", NAMED),
        ("INST", b"(" + COMMAND + b"ios\nsystem\n", r"operation 0x69"),
        ("OBJ", b"(" + SYSTEM + COMMAND + b"o", NAMED),
        ("OBJ-of-a-known-class", b"(" + name("builtins", "dict") + b"o", r"operation 0x6f"),
        ("NEWOBJ", SYSTEM + COMMAND + b"\x85\x81", NAMED),
        ("NEWOBJ_EX", SYSTEM + COMMAND + b"\x85}\x92", NAMED),
        ("EXT1", b"\x82\x01" + COMMAND + b"\x85R", extension.format(2)),
        ("EXT2", b"\x83\x01\x00" + COMMAND + b"\x85R", extension.format(3)),
        ("EXT4", b"\x84\x01\x00\x00\x00" + COMMAND + b"\x85R", extension.format(4)),
        ("PERSID", b"Pos.system\n", r"operation 0x50"),
        ("BINPERSID-of-a-call", EVIL + b"Q", NAMED),
        ("BINPERSID-of-a-text", text("os.system") + b"Q", r"pickle is damaged"),
        ("BUILD-with-a-setter", _built({"__setstate__": SYSTEM}) + COMMAND + b"b", NAMED),
        ("BUILD-of-a-class", _built({"__class__": SYSTEM}), NAMED),
        ("BUILD-of-a-reduction", _built({"__reduce__": group(SYSTEM, COMMAND)}), NAMED),
        ("BUILD-of-slots", _new("argparse", "Namespace") + group(b"N", SYSTEM) + b"b", NAMED),
        ("BUILD-on-a-name", name("builtins", "dict") + WEIGHTS + b"b", r"pickle is damaged"),
        ("BUILD-with-code-as-a-key",
         _new("argparse", "Namespace") + mapping([(EVIL, b"N")]) + b"b", NAMED),
        ("getattr-through-BUILD",
         _built({"x": call(name("builtins", "getattr"), b"N", text("system"))}),
         r"needs Python code 'builtins\.getattr'"),
        ("default-factory", call(name("collections", "defaultdict"), SYSTEM), NAMED),
        ("dropped-value", EVIL + b"0N", NAMED),
        ("dropped-group", b"(" + EVIL + b"1N", NAMED),
        ("key", mapping([(EVIL, b"N")]), NAMED),
        ("set-item", b"\x8f(" + EVIL + b"\x90", NAMED),
        ("frozen-set-item", b"(" + EVIL + b"\x91", NAMED),
        ("name-made-by-a-codec", text("os") + _decoded("encode", "system", "latin1") + b"\x93",
         r"pickle is damaged"),
        ("name-decoded-from-rot13", _decoded("decode", "bf.flfgrz", "rot13"),
         r"needs Python code '_codecs\.decode'"),
        ("call-of-a-text", text("os.system") + COMMAND + b"\x85R", r"pickle is damaged"),
        ("call-of-a-storage", storage() + COMMAND + b"\x85R", r"pickle is damaged"),
        ("call-of-what-a-call-returns", EVIL + COMMAND + b"\x85R", NAMED),
        ("call-with-keywords-in-a-dict", SYSTEM + mapping({"command": COMMAND}) + b"R", NAMED),
    )  # fmt: skip
    return [(what, HARM, _held(program), refusal) for what, program, refusal in programs]


def _new(module: str, attribute: str) -> bytes:
    return name(module, attribute) + b")\x81"


def _built(state: Mapping[str, bytes]) -> bytes:
    """Push a namespace with a state."""
    return _new("argparse", "Namespace") + mapping(state) + b"b"


def _decoded(function: str, value: str, codec: str) -> bytes:
    return call(name("_codecs", function), text(value), text(codec))


def _attributes() -> list[Row]:
    """Return names that reach something else through the attributes of a known module."""
    names = (
        ("torch", "serialization.os.system"),
        ("torch._utils", "torch.serialization.os.system"),
        ("torch", "FloatStorage.__init__.__globals__"),
        ("torch", "UntypedStorage.from_file"),
        ("torch.storage", "UntypedStorage._new_shared_filename_cpu"),
        ("torch", "Size.__class__.__subclasses__"),
        ("collections", "_sys.modules"),
        ("collections", "abc.sys.modules"),
        ("collections", "OrderedDict.fromkeys"),
        ("collections", "OrderedDict.__reduce_ex__"),
        ("builtins", "dict.__class__"),
        ("builtins", "str.format"),
        ("pathlib", "os.system"),
        ("pathlib", "Path.write_text"),
        ("numpy.core.multiarray", "_reconstruct.__class__"),
        ("numpy", "ndarray.tofile"),
        ("datetime", "sys.modules"),
        ("uuid", "os.system"),
        ("argparse", "_sys.exit"),
        ("torch.distributed.checkpoint.filesystem", "os.system"),
        ("omegaconf.base", "sys.modules"),
    )
    why = "Protocol 4 follows dots from a harmless module to whatever it imports."
    return [
        (
            f"attribute-{module}-{attribute}",
            why,
            _held(call(stack_name(module, attribute), COMMAND)),
            rf"needs Python code '{re.escape(f'{module}.{attribute}')}'",
        )
        for module, attribute in names
    ]


def _parts_of_a_tensor() -> list[Row]:
    ordered = name("collections", "OrderedDict")
    plain = (storage(), number(0), sizes([4]), sizes([1]))
    rebuild = name("torch._utils", "_rebuild_tensor_v2")
    from_type = name("torch._tensor", "_rebuild_from_type_v2")
    cls, kind = name("torch", "Tensor"), name("torch", "FloatStorage")
    of_storage = (text("storage"), kind, text("0"), text("cpu"), number(4))
    programs = (
        ("storage", call(rebuild, EVIL, *plain[1:])),
        ("offset", call(rebuild, storage(), EVIL, *plain[2:])),
        ("shape", call(rebuild, *plain[:2], group(EVIL), sizes([1]))),
        ("hooks", call(rebuild, *plain, b"\x89", call(ordered, group(EVIL)))),
        ("metadata", tensor(metadata=mapping({"conj": EVIL}))),
        ("storage-class", group(text("storage"), SYSTEM, *of_storage[2:]) + b"Q"),
        ("storage-device", group(*of_storage[:3], EVIL, number(4)) + b"Q"),
        ("storage-view", group(*of_storage, EVIL) + b"Q"),
        ("rebuilding-function", call(from_type, SYSTEM, cls, COMMAND + b"\x85")),
        ("type", call(from_type, rebuild, SYSTEM, group(*plain), b"}")),
        ("state-of-a-type",
         call(from_type, rebuild, cls, group(*plain), mapping({"x": EVIL}))),
        ("parameter", call(name("torch._utils", "_rebuild_parameter"), EVIL, b"\x88", b"N")),
        ("quantised-tensor", call(name("torch._utils", "_rebuild_qtensor"), *plain, EVIL)),
        ("wrapper", call(name("torch._utils", "_rebuild_wrapper_subclass"), SYSTEM)),
        ("numpy-tensor",
         call(name("torch._utils", "_rebuild_device_tensor_from_numpy"), EVIL, b"N", b"N", b"N")),
        ("array",
         call(name("numpy._core.multiarray", "_reconstruct"), EVIL, sizes([0]), _raw(b"b"))),
        ("reconstructor", call(name("copyreg", "_reconstructor"), SYSTEM, SYSTEM, b"N")),
        ("state-dict-metadata",
         ordered + b")R" + mapping({"_metadata": mapping({"": EVIL})}) + b"b"),
    )  # fmt: skip
    return [
        *((f"tensor-{what}", HARM, _held(program), NAMED) for what, program in programs),
        ("root", HARM, torch_bytes(EVIL), NAMED),
        ("root-and-weights", HARM, torch_bytes(EVIL + b"0" + WEIGHTS), NAMED),
        ("weights-of-a-trainer", HARM,
         torch_bytes(mapping({"model": WEIGHTS, "optimizer": mapping({"state": EVIL})})), NAMED),
        ("key-of-the-state-dict", HARM, torch_bytes(mapping([(EVIL, tensor())])), NAMED),
        ("terabyte-storage", "torch.UntypedStorage(2**40) would ask for a terabyte.",
         _held(call(name("torch", "UntypedStorage"), number(2**40))), r"pickle is damaged"),
    ]  # fmt: skip


def _members() -> list[Row]:
    evil = Member(name="archive/data.pkl", content=EVIL_PICKLE)
    source = b"open('canary', 'w')\n"
    return [
        ("byteorder", "The byte order is a word.",
         archive(order=replace(ORDER, content=EVIL_PICKLE)), r"endian|byte ?order"),
        ("version", "The version is a number.",
         archive(version=replace(VERSION, content=EVIL_PICKLE)), r"version"),
        ("second-pickle", "Another reader may take the second of two members of one name.",
         archive(more=[evil]), r"'archive/data\.pkl' twice"),
        ("pickle-of-another-folder", "Another reader may take the pickle of the second folder.",
         archive(more=[replace(evil, name="other/data.pkl")]), r"data\.pkl"),
        ("pickle-before-the-good-one", "Another reader may take the first of two members.",
         zip_bytes([evil, *torch_members(pickled(WEIGHTS))]), r"'archive/data\.pkl' twice"),
        ("torchscript-constants", "An archive with constants.pkl is a program.",
         archive(more=[replace(evil, name="archive/constants.pkl")]), r"TorchScript"),
        ("torchscript-code", "An archive with code is a program.",
         archive(more=[Member(name="archive/code/__torch__.py", content=source)]), r"TorchScript"),
        ("tar", "torch.load once ran the pickles of the oldest format, whatever it was told.",
         tar_bytes(EVIL), r"oldest format|tar archive"),
    ]  # fmt: skip


def _legacy() -> list[Row]:
    magic = number(0x1950A86A20F9469CFC6C)
    why = "All five pickles of the old format are loaded."
    return [
        ("old-magic-number", why, legacy_bytes(WEIGHTS, magic=magic + EVIL), NAMED),
        ("old-version", why, legacy_bytes(WEIGHTS, version=EVIL), NAMED),
        ("old-machine", why, legacy_bytes(WEIGHTS, machine=EVIL), NAMED),
        ("old-root", why, legacy_bytes(mapping({"w": tensor(), "x": EVIL})), NAMED),
        ("old-keys", why, legacy_bytes(WEIGHTS, keys=EVIL), NAMED),
        ("old-sixth-pickle", why, legacy_bytes(WEIGHTS, after=EVIL_PICKLE), r"bytes left over"),
    ]


def _plain_pickles() -> list[Row]:
    why = "A pickle without anything around it can only be loaded, not read."
    refusal = r"plain pickle, which is never run"
    contents = {
        "protocol-0": b"cos\nsystem\n(Vtouch canary\ntR.",
        "protocol-0-in-a-dict": b"(dp0\nVw\np1\ncos\nsystem\n(Vtouch canary\ntRs.",
        "protocol-1": b"}q\x00(" + text("w") + EVIL + b"u.",
        "protocol-2": EVIL_PICKLE,
        "protocol-4": pickled(call(stack_name("os", "system"), COMMAND), protocol=4),
        "protocol-5-in-a-frame": b"\x80\x05\x95" + struct.pack("<Q", len(EVIL) + 1) + EVIL + b".",
        "two-of-them": pickled(mapping({"w": b"N"})) + EVIL_PICKLE,
    }
    return [(what, why, content, refusal) for what, content in contents.items()]


def _arrays() -> list[Row]:
    array = npy(data=EVIL_PICKLE, descr="'|O'")
    return [
        ("of-objects", "numpy pickles arrays of objects.",
         zip_bytes([Member(name="w.npy", content=array)]), r"'w\.npy' holds Python objects"),
        ("of-fields-with-objects", "numpy pickles arrays of objects.",
         zip_bytes([Member(name="w.npy", content=npy(data=EVIL_PICKLE, descr="[('a', '|O')]"))]),
         r"'w\.npy'.*(fields|objects)"),
        ("alone", "numpy pickles arrays of objects.", array, r"single numpy array"),
        ("pickle-as-a-member", "numpy loads members without a header as pickles.",
         zip_bytes([Member(name="w.npy", content=EVIL_PICKLE)]), r"'w\.npy' has no header"),
        ("code-as-a-header", "The header is a literal, not an expression.",
         zip_bytes([Member(name="w.npy", content=npy("open('canary', 'w')"))]),
         r"'w\.npy' has a damaged header"),
    ]  # fmt: skip


# -- directories


def _beside(files: Mapping[str, bytes], options: Sequence[str] = ()) -> Build:
    """Return what writes two model directories with other files beside good weights."""
    told = {"auto_map": {"AutoModel": "modeling_x.Model"}, "architectures": ["Model"]}

    def build(directory: Path) -> Sequence[str]:
        for first, label in ((0, "a"), (2, "b")):
            inside = directory / label
            inside.mkdir()
            weights = in_archive(mapping({"w": view()}))([float(first + at) for at in range(8)])
            (inside / "pytorch_model.bin").write_bytes(weights)
            for one, content in files.items():
                (inside / one).write_bytes(content)
            (inside / "config.json").write_text(json.dumps(told))
        return ["a", "b", *options]

    return build


def _directory(files: Mapping[str, bytes]) -> Build:
    """Return what writes a good checkpoint, and a bad one that is a directory."""

    def build(directory: Path) -> Sequence[str]:
        alone(b"")(directory)
        (directory / "bad.safetensors").unlink()
        (directory / "bad").mkdir()
        for one, content in files.items():
            (directory / "bad" / one).write_bytes(content)
        return ["good.safetensors", "bad"]

    return build


def _directories() -> list[Case]:
    index = {"metadata": {}, "weight_map": {"w": "pytorch_model-00001-of-00001.bin"}}
    evil = _held(EVIL)
    bad: Mapping[str, Mapping[str, bytes]] = {
        "pytorch_model.bin": {"pytorch_model.bin": evil},
        "pytorch_model-00001-of-00001.bin": {
            "pytorch_model.bin.index.json": json.dumps(index).encode(),
            "pytorch_model-00001-of-00001.bin": evil,
        },
        "adapter_model.bin": {"adapter_model.bin": evil, "adapter_config.json": b"{}"},
        "mp_rank_00_model_states.pt": {"mp_rank_00_model_states.pt": evil},
        "pytorch_model_fsdp.bin": {"pytorch_model_fsdp.bin": evil},
        "weights.ckpt": {"weights.ckpt": evil},
    }
    return [
        *(
            Case(
                name=f"code-in-directory/{culprit}",
                why=HARM,
                build=_directory(files),
                refusal=NAMED,
                culprit=f"bad/{culprit}",
            )
            for culprit, files in bad.items()
        ),
        Case(
            name="code-in-directory/scheduler.pt-when-asked-for",
            why="The one other file that is read, for its learning rate, is not loaded either.",
            build=_beside({"scheduler.pt": evil}, options=["--constant-lr"]),
            refusal=r"tells no learning rate",
            culprit="a: ",
        ),
    ]


def _never_run() -> list[Case]:
    """Return what is code, but lies where nothing is loaded: the weights are averaged."""
    mean = [float(at) for at in range(1, 9)]
    source = b"open('canary', 'w')\n"
    torch_files = (
        "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth", "training_args.bin",
    )  # fmt: skip
    pickles = ("random_states_0.pkl", "custom_checkpoint_0.pkl", "x.pickle")
    programs = ("modeling_x.py", "conftest.py", "setup.py", "sitecustomize.py")
    beside: Mapping[str, bytes] = {
        **dict.fromkeys(torch_files, _held(EVIL)),
        **dict.fromkeys(pickles, EVIL_PICKLE),
        **dict.fromkeys(programs, source),
        "array.npy": npy(data=EVIL_PICKLE, descr="'|O'"),
    }
    held = _held_values()
    placed = {
        "behind-the-end": _in_members(pickled(mapping({"w": view()})) + EVIL_PICKLE),
        "in-another-member": _in_members(
            None, Member(name="archive/extra.pkl", content=EVIL_PICKLE)
        ),
        "in-a-member-of-source": _in_members(None, Member(name="archive/x.py", content=source)),
        "in-a-storage": _in_members(None, Member(name="archive/data/1", content=EVIL_PICKLE)),
    }
    return [
        *(
            Case(
                name=f"code-never-run/{one}",
                why="A trainer's other files are not needed, so they are never loaded.",
                build=_beside({one: content}),
                refusal=None,
                values={"w": mean},
            )
            for one, content in beside.items()
        ),
        *(
            Case(
                name=f"code-never-run/{what}",
                why="What describes data is data, whatever the class would do with it.",
                build=both(in_archive(mapping({"w": view(), "x": value}))),
                refusal=None,
                values={"w": mean},
            )
            for what, value in held.items()
        ),
        *(
            Case(
                name=f"code-never-run/pickle-{what}",
                why="Only the one pickle is read, and only up to its end.",
                build=both(make),
                refusal=None,
                values={"w": mean},
            )
            for what, make in placed.items()
        ),
    ]


def _held_values() -> Mapping[str, bytes]:
    """Return values that would do something if the classes were the real ones, by name."""
    inert = name("numpy._core.multiarray", "scalar")
    dtype = call(name("numpy", "dtype"), text("O8"))
    return {
        "pickle-in-bytes": _raw(EVIL_PICKLE),
        "pickle-in-a-text": text("cos\nsystem\n(S'touch canary'\ntR."),
        "source-in-a-text": SOURCE,
        "pickle-in-a-numpy-scalar": call(inert, dtype, _raw(EVIL_PICKLE)),
        "state-of-dunders": _built(
            {"__class__": text("os.system"), "__dict__": b"}", "__setstate__": COMMAND}
        ),
        "state-of-an-ordered-dict": _new("collections", "OrderedDict")
        + mapping({"__init__": COMMAND, "items": b"N"})
        + b"b",
        "namespace-without-init": call(
            name("copyreg", "_reconstructor"),
            name("argparse", "Namespace"),
            name("builtins", "object"),
            b"N",
        ),
        "terabyte": call(name("builtins", "bytearray"), number(2**40)),
        "endless-range": call(
            name("builtins", "list"), call(name("builtins", "range"), number(2**62))
        ),
        "terabyte-array": call(
            name("numpy.core.multiarray", "_reconstruct"),
            name("numpy", "ndarray"),
            sizes([2**40]),
            _raw(b"b"),
        ),
        "huge-decimal": call(name("decimal", "Decimal"), text("1e999999999")),
        "layout-in-words": call(name("torch.serialization", "_get_layout"), SOURCE),
        "device-in-words": call(name("torch", "device"), COMMAND),
        "path": call(name("pathlib", "PosixPath"), text(".."), PATH),
    }


def _in_members(pickle: bytes | None, *more: Member) -> Make:
    """Return what puts eight numbers into an archive with another pickle, or more members."""
    good = pickled(mapping({"w": view()}))

    def make(numbers: Sequence[float]) -> bytes:
        data = struct.pack("<8f", *numbers)
        return zip_bytes([*torch_members(pickle or good, {"0": data}), *more])

    return make

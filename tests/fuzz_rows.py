"""Hostile files of rows, for ``tests.fuzz``: JSON lines, CSV, Parquet, Arrow, tar."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import struct
import tarfile

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

import gemma_tuner as gt
from tests.fuzz import SECRET, Reader, mutate

_IMAGE = bytes.fromhex(  # a grey PNG of one pixel
    "89504e470d0a1a0a0000000d49484452000000010000000108000000003a7e9b55"
    "0000000a49444154789c63680000008200817dcd727a0000000049454e44ae426082"
)
_STRANGE = (
    *(None, True, False, 0, -1, 2**31, 2**63, 2**64, -(2**63), 10**400, 1e308, -0.0),
    *(float("nan"), float("inf"), "", " ", "\0", "\ud800", "\ufeff", "\u2028", "a" * 5000),
    *(
        "../../etc/passwd",
        "/dev/zero",
        "/dev/stdin",
        "gs://",
        "gs://b/",
        "gs://b/../x#0",
        "file:///",
    ),
    *("data:image/png;base64,", "data:,", "<|turn>", "<bos>", "~", "http://[::1", "a\0.png"),
    *([], {}, [[]], [{}], [None], {"": ""}, {"role": None}, [{"role": "user"}], {"bytes": None}),
)


# --- rows ----------------------------------------------------------------------------------------


def _make_text(rng):
    return SECRET + " ".join(rng.choices(("cat", "naïve", "日本", "1.5", "\U0001f600"), k=6))


def _make_row(rng):
    """A valid row of one of the layouts."""
    text = _make_text(rng)
    match rng.randrange(7):
        case 0:
            return {"prompt": text, "response": text}
        case 1:
            return {"id": rng.randrange(99), "text": text, "split": rng.choice(("train", "test"))}
        case 2:
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
            return {"messages": turns}
        case 3:
            parts = [{"type": "text", "text": text}, {"type": "image"}]
            call = {"function": {"name": "add", "arguments": {"a": {"b": [1, 2]}}}}
            turns = [
                {"role": "user", "content": parts},
                {"role": "assistant", "content": text, "tool_calls": [call]},
            ]
            tool = {"type": "function", "function": {"name": "add", "parameters": {}}}
            return {"messages": turns, "images": ["a.png"], "tools": [tool]}
        case 4:
            return {"image": "a.png", "prompt": text, "response": text, "weight": 1.0}
        case 5:
            turns = [{"from": "human", "value": text}, {"from": "gpt", "value": text}]
            return {"conversations": turns}
        case _:
            return {"instruction": text, "input": text, "output": text, "history": [[text, text]]}


def _nest(value, rng):
    depth = rng.choice((2, 60, 70, 900, 20_000))
    for _ in range(min(depth, 900)):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def _disturb(value, rng):
    """Change a value of a row somewhere within."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        value = dict(value)
        name = rng.choice(list(value))
        match rng.randrange(10):
            case 0:
                del value[name]
            case 1:
                value[rng.choice(("", "role", "a" * 300, "\ud800", "image", "é"))] = value[name]
            case _:
                value[name] = _disturb(value[name], rng)
        return value
    if isinstance(value, list) and value and rng.random() < 0.9:
        value = list(value)
        place = rng.randrange(len(value))
        match rng.randrange(8):
            case 0:
                del value[place]
            case 1:
                value *= rng.choice((2, 100))
            case _:
                value[place] = _disturb(value[place], rng)
        return value
    return (
        _nest(value, rng) if rng.random() < 0.1 else rng.choice((*_STRANGE, [value], {"a": value}))
    )


def _make_rows(rng):
    layout = rng.getrandbits(32)
    rows = [_make_row(random.Random(layout)) for _ in range(rng.choice((1, 2, 3, 8, 70)))]
    for _ in range(rng.choice((0, 0, 1, 2, 5))):
        place = rng.randrange(len(rows))
        rows[place] = _disturb(rows[place], rng)
    if rng.random() < 0.1:
        rows.insert(rng.randrange(len(rows) + 1), _make_row(rng))
    return rows


def _read(folder):
    """Read every example; the options are the input's, too."""
    name = (folder / "name").read_text()
    seen = name.count("?")  # of the three kinds of name, one allows no bad row
    stream = gt.stream_local(
        folder / "data" / name.rstrip("?"),
        cache_dir=folder / "cache",
        shuffle=False,
        max_bad_fraction=(1.0, 1.0, 0.0)[seen],
    )
    for example in stream:
        assert example.key
    stream.report()


def _write(folder, name, content, rng):
    (folder / "data").mkdir()
    (folder / "data/a.png").write_bytes(_IMAGE)
    (folder / "data" / name).write_bytes(content)
    (folder / "name").write_text(name + "?" * rng.choice((0, 1, 2)))


# --- JSON lines and documents --------------------------------------------------------------------


def _write_json(rng, folder):
    content = _make_json(rng)
    if rng.random() < 0.5:
        content = mutate(content, rng, _make_json(rng))
    packing = rng.choice(("", "", "", "", ".gz", ".bz2", ".xz", ".zst"))
    if packing:
        content = _pack(content, packing)
        content = mutate(content, rng) if rng.random() < 0.5 else content
    _write(folder, f"rows{rng.choice(('.jsonl', '.jsonl', '.json'))}{packing}", content, rng)


def _make_json(rng):
    rows = _make_rows(rng)
    escaped = rng.random() < 0.5
    texts = [json.dumps(row, ensure_ascii=escaped or "ud800" in repr(row)) for row in rows]
    if rng.random() < 0.1:
        place = rng.randrange(len(texts))
        depth = rng.choice((100, 2_000, 100_000))
        texts[place] = rng.choice(
            (
                "[" * depth + "]" * depth,
                '{"text":' * depth + "1" + "}" * depth,
                "[" * depth,
                '{"text": ' + "9" * depth + "}",
                '{"text": 1e' + "9" * depth + "}",
                '{"text": "' + "x" * depth,
                '{"text": "a", "text": "b"}',
            )
        )
    match rng.randrange(8):
        case 0:
            text = "[" + ",\n".join(texts) + "]"
        case 1:
            text = "\n".join(json.dumps(row, indent=1) for row in rows)
        case 2:
            names = ("data", "rows", "train", "test", "images", "annotations", "x")
            text = json.dumps(dict.fromkeys(rng.sample(names, rng.choice((1, 2))), rows))
        case 3:
            images = [{"id": 1, "file_name": "a.png"}, *rows[:1]]
            notes = [{"image_id": 1, "id": 1, "caption": _make_text(rng)}, *rows[:1]]
            value = {"images": images, "annotations": notes}
            text = json.dumps(_disturb(value, rng) if rng.random() < 0.8 else value)
        case 4:
            answer = {"text": [_make_text(rng)], "answer_start": [0]}
            question = {"id": "q", "question": _make_text(rng), "answers": answer}
            paragraph = {"context": _make_text(rng), "qas": [question]}
            value = {"data": [{"title": "t", "paragraphs": [paragraph]}]}
            text = json.dumps(_disturb(value, rng) if rng.random() < 0.8 else value)
        case _:
            text = rng.choice(("\n", "\n", "\r\n", "\n\n")).join(texts) + "\n"
    encoding = rng.choice(
        ("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "cp1252")
    )
    return text.encode(encoding, "replace" if encoding == "cp1252" else "surrogatepass")


def _pack(content, packing):
    if packing == ".zst":
        sink = io.BytesIO()
        with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
            stream.write(content)
            stream.flush()
            return sink.getvalue()
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[packing](content)


# --- CSV -----------------------------------------------------------------------------------------


def _write_csv(rng, folder):
    content = _make_csv(rng)
    if rng.random() < 0.7:
        content = mutate(content, rng, _make_csv(rng))
    packing = rng.choice(("", "", "", ".gz"))
    if packing:
        content = mutate(_pack(content, packing), rng) if rng.random() < 0.3 else content
    _write(folder, f"rows{rng.choice(('.csv', '.tsv'))}{packing}", content, rng)


def _make_csv(rng):
    rows = _make_rows(rng)
    names = [name for row in rows if isinstance(row, dict) for name in row]
    names = list(dict.fromkeys(names)) or ["text"]
    sink = io.StringIO()
    writer = csv.writer(
        sink,
        delimiter=rng.choice(",,,\t|;"),
        quoting=rng.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_MINIMAL)),
        lineterminator=rng.choice(("\n", "\r\n", "\r")),
        doublequote=rng.random() < 0.8,
        escapechar="\\",
    )
    if rng.random() < 0.9:
        writer.writerow(names)
    for row in rows:
        values = [row.get(name) for name in names] if isinstance(row, dict) else [row]
        writer.writerow([_write_cell(value) for value in values])
    if rng.random() < 0.1:  # LJSpeech's
        sink = io.StringIO(
            "".join(f"LJ{i:03}|{_make_text(rng)}|{_make_text(rng)}\n" for i in range(5))
        )
    encoding = rng.choice(("utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "cp1252"))
    return sink.getvalue().encode(encoding, "replace" if encoding == "cp1252" else "surrogatepass")


def _write_cell(value):
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except RecursionError:
        return "[" * 5000


# --- Parquet and Arrow ---------------------------------------------------------------------------


def _write_parquet(rng, folder):
    table = _make_table(rng)
    sink = io.BytesIO()
    options = {
        "compression": rng.choice(("none", "none", "snappy", "gzip", "zstd", "lz4", "brotli")),
        "use_dictionary": rng.random() < 0.5,
        "row_group_size": rng.choice((1, 3, 1000)),
        "data_page_version": rng.choice(("1.0", "2.0")),
        "write_page_index": rng.random() < 0.2,
        "store_schema": rng.random() < 0.7,
    }
    try:
        pyarrow.parquet.write_table(table, sink, **options)
    except pyarrow.ArrowException:  # which has no such times
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table.select(table.schema.names[:1]), sink, **options)
    _write(folder, "rows.parquet", _damage_parquet(sink.getvalue(), rng), rng)


def _damage_parquet(content, rng):
    match rng.randrange(5):
        case 0:
            return content
        case 1:  # the footer, which says how large everything is
            size = struct.unpack("<I", content[-8:-4])[0]
            footer = mutate(content[-8 - size : -8], rng)
            return content[: -8 - size] + footer + struct.pack("<I", len(footer)) + b"PAR1"
        case 2:  # a page, and lengths stay
            size = struct.unpack("<I", content[-8:-4])[0]
            pages = bytearray(content[: -8 - size])
            for _ in range(rng.choice((1, 2, 8))):
                pages[rng.randrange(len(pages))] = rng.choice(
                    (0, 0x7F, 0x80, 0xFF, rng.randrange(256))
                )
            return bytes(pages) + content[-8 - size :]
        case 3:  # varints made huge in place
            pages = bytearray(content)
            start = rng.randrange(max(1, len(pages) - 10))
            pages[start : start + 5] = b"\xfe\xff\xff\xff\x0f"
            return bytes(pages)
        case _:
            return mutate(content, rng)


def _write_arrow(rng, folder):
    table = _make_table(rng)
    sink = io.BytesIO()
    make = rng.choice((pyarrow.ipc.new_file, pyarrow.ipc.new_stream))
    codec = rng.choice((None, None, "lz4", "zstd"))
    with make(
        sink, table.schema, options=pyarrow.ipc.IpcWriteOptions(compression=codec)
    ) as writer:
        writer.write_table(table, max_chunksize=rng.choice((1, 3, 1000)))
    content = sink.getvalue()
    if rng.random() < 0.4:
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 2, 8))):
            damaged[rng.randrange(len(damaged))] = rng.choice(
                (0, 0x7F, 0x80, 0xFF, rng.randrange(256))
            )
        content = bytes(damaged)
    elif rng.random() < 0.8:
        content = mutate(content, rng)
    _write(folder, "rows.arrow", content, rng)


def _make_table(rng):
    """A table of rows, of columns of every type beside them."""
    size = rng.choice((1, 3, 70))
    text = [_make_text(rng) for _ in range(size)]
    bytes_type = rng.choice(
        (pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary(len(_IMAGE)))
    )
    kinds = {
        "prompt": pyarrow.array(text, rng.choice((pyarrow.string(), pyarrow.large_string()))),
        "response": pyarrow.array(text).dictionary_encode(),
    }
    turns = [[{"role": "user", "content": t}, {"role": "assistant", "content": t}] for t in text]
    if rng.random() < 0.3:
        kinds = {"messages": pyarrow.array(turns)}
    if rng.random() < 0.3:
        kinds["image"] = pyarrow.array([{"bytes": _IMAGE, "path": None}] * size)
    elif rng.random() < 0.3:
        kinds["image"] = pyarrow.array([_IMAGE] * size, bytes_type)
    numbers = [rng.choice((None, 0, -1, 2**62, -(2**63))) for _ in range(size)]
    small = [rng.choice((None, 0, -1, 2**31 - 1)) for _ in range(size)]
    further = (
        pyarrow.array(numbers, pyarrow.int64()),
        pyarrow.array(numbers, pyarrow.timestamp(rng.choice(("s", "ms", "us", "ns")))),
        pyarrow.array(
            numbers, pyarrow.timestamp("us", tz=rng.choice(("UTC", "Mars/Base", "+99:99")))
        ),
        pyarrow.array(numbers, pyarrow.duration("s")),
        pyarrow.array(small, pyarrow.date32()),
        pyarrow.array(numbers, pyarrow.time64("ns"))
        if rng.random() < 0.3
        else pyarrow.nulls(size),
        pyarrow.array(
            [[("k", 1), ("k", 2)]] * size, pyarrow.map_(pyarrow.string(), pyarrow.int64())
        ),
        pyarrow.array([b"\xff\xfe"] * size, pyarrow.binary()).view(pyarrow.string()),
        pyarrow.array([[[[_make_text(rng)]]]] * size),
        pyarrow.array([float("nan")] * size, pyarrow.float16()),
    )
    names = ("id", "weight", "split", "tools", "images", "system", "x", "context", "audio")
    for name in rng.sample(names, rng.choice((0, 1, 2))):
        kinds[name] = rng.choice(further)
    table = pyarrow.table(kinds)
    if rng.random() < 0.05:  # one name twice
        table = table.append_column(table.schema.names[0], table.column(0))
    return table


# --- tars ----------------------------------------------------------------------------------------


def _write_tar(rng, folder):
    content = bytearray(_make_tar(rng))
    match rng.randrange(6):
        case 0 | 1:
            _damage_headers(content, rng)
        case 2 | 3:
            content = mutate(bytes(content), rng, _make_tar(rng))
        case _:
            pass
    _write(folder, "rows.tar", bytes(content), rng)


def _make_tar(rng):
    sink = io.BytesIO()
    kind = rng.choice((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT))
    with tarfile.open(fileobj=sink, mode="w", format=kind) as tar:
        for number in range(rng.choice((1, 2, 5))):
            stem = rng.choice(("", "./", "a/", "日本/", "a" * 90 + "/")) + f"{number:04}"
            fields = _make_row(rng) if rng.random() < 0.3 else {"response": _make_text(rng)}
            if rng.random() < 0.3:
                fields = _disturb(fields, rng)
            text = json.dumps(fields).encode()
            parts = {"png": _IMAGE, "txt": _make_text(rng).encode(), "json": text}
            for ending in rng.sample(list(parts), rng.choice((1, 2, 3))):
                column = rng.choice(("", "", "", "prompt.", "mask.", "\udcff.", "x" * 120 + "."))
                info = tarfile.TarInfo(f"{stem}.{column}{ending}")
                body = mutate(parts[ending], rng) if rng.random() < 0.1 else parts[ending]
                info.size = len(body)
                if rng.random() < 0.1 and kind == tarfile.PAX_FORMAT:
                    info.pax_headers = {
                        rng.choice(("size", "path", "mtime", "GNU.sparse.map", "GNU.sparse.size"))
                        if rng.random() < 0.8
                        else "hdrcharset": rng.choice(
                            ("-1", "9" * 30, "nan", "", "1,2,3", "x", "1e999", "BINARY", "\ud800")
                        )
                    }
                if rng.random() < 0.1:
                    info.type = rng.choice(b"0123456789LKxgSVD").to_bytes()
                try:
                    tar.addfile(info, io.BytesIO(body))
                except (ValueError, tarfile.TarError):  # what this format cannot say
                    info.name, info.pax_headers, info.type = f"{number}.txt", {}, b"0"
                    tar.addfile(info, io.BytesIO(body))
    return sink.getvalue()


def _damage_headers(content, rng):
    """Write strange numbers and kinds into headers, whose checksums are right again."""
    for _ in range(rng.choice((1, 1, 2))):
        start = 512 * rng.randrange(max(1, len(content) // 512))
        header = content[start : start + 512]
        if len(header) < 512:
            continue
        sizes = (
            b"77777777777\0",
            b"-0000000001\0",
            b"\x80" + b"\0" * 3 + b"\xff" * 8,
            b"\xff" * 12,
        )
        sizes += (b"9" * 12, b"           \0", b"\x80" + b"\0" * 9 + b"\x10\0", rng.randbytes(12))
        place, value = rng.choice(
            (
                (124, rng.choice(sizes)),
                (124, rng.choice(sizes)),
                (156, rng.choice(b"0123456789LKxgXSVMND\0\xff").to_bytes()),
                (100, rng.choice((b"zzzzzzz\0", b"\xff" * 8))),
                (136, rng.choice(sizes)),
                (0, mutate(bytes(header[:100]), rng)[:100].ljust(100, b"\0")),
                (257, rng.choice((b"ustar\x0000", b"ustar  \0", b"\0" * 8, b"GNUtar "))),
                (386, rng.choice(sizes) * 8),
            )
        )
        header[place : place + len(value)] = value
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % (sum(header) & 0o777777)
        content[start : start + 512] = header[:512]


READERS = {
    "jsonl": Reader(_write_json, _read),
    "csv": Reader(_write_csv, _read),
    "parquet": Reader(_write_parquet, _read),
    "arrow": Reader(_write_arrow, _read),
    "tar": Reader(_write_tar, _read),
}

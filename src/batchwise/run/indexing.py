"""`shards DIR`: the index of a folder of shards."""

import sys
from argparse import ArgumentParser

from batchwise.errors import Mistake, mistakes, optional
from batchwise.run import program, report
from batchwise.sources.shard_index import Index, make_index
from batchwise.sources.store import Store


def index(arguments: list[str]) -> int:
    """Make the index of a folder; return the exit code."""
    parser = ArgumentParser(f"python -m {program.name} shards", description=__doc__)
    parser.add_argument("path", metavar="DIR", help="a folder of shards, or an address such as s3://bucket/folder")
    path = parser.parse_args(arguments).path
    try:
        with mistakes():
            optional("pyarrow", "shards")
            print(described(make_index(Store(path))), flush=True)
    except Mistake as error:
        return report.failure(error) or 2
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def described(found: Index) -> str:
    """Return a summary of an index, with a line for each split and each column."""
    lines = []
    for split in ("train", "val", "test"):
        if shards := found.of(split):
            examples, size = sum(shard.examples for shard in shards), sum(shard.bytes for shard in shards)
            lines.append(f"{split}: {len(shards):,} shards, {examples:,} examples, {size / 2**20:,.1f} MiB")
    for name, column in found.columns.items():
        values = "" if column.values is None else f", {len(column.values):,} different values"
        wrong = f"; missing or not finite in {column.wrong}" if column.wrong else ""
        alike = f", of whose variance {column.alike:.0%} is between shards" if column.alike > 0.01 else ""
        lines.append(f"column {name}: {column.type}{values}{alike}{wrong}")
    return "\n".join(lines)

"""Reads `cargo metadata`, and names each dependency of the workspace that wants a newer Rust than the one given."""

import json
import sys


def version(text):
    return tuple(int(part) for part in text.split(".")[:2])


def too_new(package, oldest):
    return package["rust_version"] and version(package["rust_version"]) > version(oldest)


def reached(metadata, oldest):
    """The packages that a user of the library or of a program builds. A member may say itself that it wants more."""
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    members = [package for package in metadata["packages"] if package["id"] in metadata["workspace_members"]]
    seen, waiting = set(), [member["id"] for member in members if not too_new(member, oldest)]
    while waiting:
        package = waiting.pop()
        if package in seen:
            continue
        seen.add(package)
        for dependency in nodes[package]["deps"]:
            if any(kind["kind"] != "dev" for kind in dependency["dep_kinds"]):
                waiting.append(dependency["pkg"])
    return seen


metadata, oldest = json.load(sys.stdin), sys.argv[1]
used = reached(metadata, oldest)
found = [
    f"{package['name']} {package['version']} wants Rust {package['rust_version']}"
    for package in metadata["packages"]
    if package["id"] in used and too_new(package, oldest)
]
print("\n".join(found) or f"{len(used)} packages, all content with Rust {oldest}")
sys.exit(bool(found))

"""Reads `cargo metadata`, and prints the arguments that select the targets of each set of required features."""

import json
import sys

KINDS = {"bench": "--bench", "example": "--example", "test": "--test"}

targets = {}
for package in json.load(sys.stdin)["packages"]:
    for target in package["targets"]:
        features = target.get("required-features")
        if features:
            targets.setdefault((package["name"], *features), []).append(f"{KINDS[target['kind'][0]]} {target['name']}")

# Targets without required features need none.
print("--all-targets")
for (package, *features), selected in sorted(targets.items()):
    print(f"--package {package} --features {','.join(features)} {' '.join(selected)}")

"""The quickstart must show what README says it shows: real forgetting under its own rule."""

import json
import sys
from pathlib import Path

report = json.loads(Path(sys.argv[1]).read_text())
assert report["schema"] == 1
assert report["chosen"]["bound_met"], report["chosen"]
assert report["chosen"]["coefficient"] > 0
rows = {(r["set"], r["name"], r["metric"]): r for r in report["scores"]}
forget = rows["forget", "europe", "acc"]
drop = forget["before"]["value"] - forget["after"]["value"]
print(f"forget accuracy {forget['before']['value']:.3f} -> {forget['after']['value']:.3f} (n={forget['after']['n']})")
assert drop >= 0.15, drop
for (role, name, metric), row in rows.items():
    if role != "forget" and metric == "acc":
        kept = row["after"]["value"] / row["before"]["value"]
        print(f"{role} {name} kept {kept:.3f} of its test accuracy (n={row['after']['n']})")
        # chosen on validation items; on test items a few may turn either way
        assert kept >= 0.85, (name, kept)
minutes = sum(report["seconds"].values()) / 60
print(f"{minutes:.1f} minutes")

"""The ablation matrix: cells from a YAML, what is done and what is left, the pool, the verdicts. Trains nothing."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from examples.ablation_matrix import __main__ as command
from examples.ablation_matrix import metrics, report, results, runs
from examples.ablation_matrix.matrix import Claim, Matrix, load
from examples.ablation_matrix.results import Result, verdict
from scipy import stats

import sd3
from dmdr import images
from dmdr.errors import ConfigError
from dmdr.settings.fields import Config

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "ablation_matrix"
COMMAND = (sys.executable, "-m", "examples.ablation_matrix")  # in the root of the repository
TOY = Path(__file__).with_name("ablation_toy.yaml")
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """The toy's matrix with other content; its `quick` is of its blocks."""

    def written(**changes: Any) -> Path:
        file = tmp_path / "matrix.yaml"
        content = yaml.safe_load(TOY.read_text()) | ({"quick": None} if "blocks" in changes else {}) | changes
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        return file

    return written


@pytest.fixture
def toy(tmp_path: Path) -> Matrix:
    return load(TOY, tmp_path)


# ---- from the YAML to runs


@pytest.fixture(scope="module")
def default() -> Matrix:
    return load(EXAMPLE / "matrix.yaml", Path("out"))


def test_the_default_matrix_shares_what_is_the_same(default: Matrix) -> None:
    blocks = {block.name: block.cells for block in default.blocks}
    joint = blocks["figure3"]["joint"]
    assert [run.seed for run in joint] == list(default.seeds) == [0, 1, 2]
    same = [blocks["figure4"]["RT-DM, then joint"], blocks["table5a"]["HPS + CLIP"], blocks["table5b"]["ReFL"]]
    assert all(other[i] is joint[i] for other in same for i in range(3))
    assert blocks["table5a"]["DMD only"][0] is blocks["figure3"]["DMD only"][0]
    starts = {label: run.start for block in ("figure3", "table5a", "table5b", "table5c", "few-step")
              for label, (run, *_) in blocks[block].items() if label != "stage 1"}  # fmt: skip
    assert {start.name for start in starts.values() if start} == {blocks["table5b"]["stage 1"][0].name}
    assert len({run.start.name for (run, *_) in blocks["table6"].values() if run.start}) == 3  # one by guidance
    names = [run.name for run in default.runs]
    assert len(set(names)) == len(names) == 111
    assert all(names.index(run.start.name) < names.index(run.name) for run in default.runs if run.start)


def test_a_stage_1_is_what_a_plain_distillation_would_be(default: Matrix) -> None:
    grpo = next(block.cells["GRPO"][1] for block in default.blocks if block.name == "table5b")
    assert grpo.settings.config.num_generations == 8
    assert grpo.start is not None
    first = grpo.start.settings.config
    assert (first.rl, first.stage2_steps, first.num_generations, first.seed) == ("none", 0, 1, 1)
    assert grpo.settings.config.init_student == f"out/cells/{grpo.start.name}"
    assert grpo.updates == 200


def test_every_claim_of_the_default_matrix_can_be_measured(default: Matrix) -> None:
    for block in default.blocks:  # `load` refuses metrics that are not measured
        assert block.claims
        assert len(set(block.claims)) == len(block.claims)
        assert all(claim.noise == 5 * (claim.metric == "frechet_distance") for claim in block.claims)


def test_a_cell_without_a_stage_1_starts_from_the_teacher(default: Matrix) -> None:
    cells = next(block.cells for block in default.blocks if block.name == "table1")
    run = cells["LCM"][0]
    config = run.settings.config
    assert (run.start, config.init_student, config.dmd_weight, config.rl) == (None, None, 0.0, "lcm")
    assert (run.updates, run.stage, run.evaluations[-1][0]) == (200, "stage 2", 200)
    assert run.name.startswith("stage2_lcm-")


def test_grids_exports_and_labels(tmp_path: Path, write: Write) -> None:
    content = {"start": "export", "grid": {"rl_weight": [0.1, 1], "refl_steps": ["last", "any"]}, "table": []}
    block = load(write(blocks={"g": content}), tmp_path).blocks[0]
    assert list(block.cells) == [f"rl_weight {w}, refl_steps {s}" for w in (0.1, 1) for s in ("last", "any")]
    runs = [runs[0] for runs in block.cells.values()]
    assert len({run.start.name for run in runs if run.start}) == 1
    assert all(str(run.settings.config.init_student).endswith("/student") for run in runs)
    assert [run.settings.of("objectives")[0].options["steps"] for run in runs] == ["last", "any"] * 2


def test_quick_is_the_same_matrix_in_short(tmp_path: Path) -> None:
    quick = load(TOY, tmp_path, quick=True)
    assert [block.name for block in quick.blocks] == ["weights"]
    assert {run.updates for runs in quick.blocks[0].cells.values() for run in runs} == {8}
    whole = {run.name for run in load(TOY, tmp_path).runs}
    assert {run.name for run in quick.runs} & whole == {run.start.name for run in quick.runs if run.start}


def test_the_matrix_of_the_readme(tmp_path: Path) -> None:
    readme = (EXAMPLE / "README.md").read_text()
    file = tmp_path / "matrix.yaml"
    file.write_text(readme.partition("```yaml\n")[2].partition("```")[0])
    block, quick = load(file, tmp_path).blocks[0], load(file, tmp_path, quick=True).blocks[0]
    assert list(block.cells)[:3] == ["DMD only", "joint", "dmd_weight 0.5, rl_weight 0.3"]
    assert [runs[0].settings.config.num_eval_samples for runs in quick.cells.values()] == [200] * 6


def test_a_cell_may_have_a_start_of_its_own(tmp_path: Path, write: Write) -> None:
    block = load(write(blocks={"a": {"cells": {"x": {}, "y": {"start": "export"}}}}), tmp_path).blocks[0]
    assert [str(runs[0].settings.config.init_student).endswith("/student") for runs in block.cells.values()] == [0, 1]


def test_other_settings_are_another_folder_and_another_place_is_not(tmp_path: Path, write: Write, toy: Matrix) -> None:
    settings = yaml.safe_load(TOY.read_text())["settings"]
    changed = load(write(settings=settings | {"stage1_steps": 7}), tmp_path)
    assert not {run.name for run in changed.runs} & {run.name for run in toy.runs}
    assert [run.name for run in load(TOY, Path("elsewhere")).runs] == [run.name for run in toy.runs]


def test_a_report_needs_no_inputs(tmp_path: Path, write: Write) -> None:
    """It may be written where the prompts are not."""
    file = write(blocks={"a": {"cells": {"x": {"prompts": "gone.txt"}}}})
    assert len(load(file, tmp_path, inputs=False).runs) == 2


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: [0]\nsettings: {}\nseeds: [1]\n", "the key 'seeds' is there twice, in lines 1 and 3"),
        ("blocks:\n  a:\n    cells: {x: {}, y: {}, x: {rl: none}}\n", "the key 'x' is there twice, in lines 3 and 3"),
        (
            "seeds: &again [0]\nblocks:\n  a: {claims: [{higher: x, higher: *again}]}\n",
            "the key 'higher' is there twice, in lines 3",
        ),
    ],
)
def test_a_key_is_there_once(tmp_path: Path, text: str, said: str) -> None:
    """YAML itself keeps the last."""
    file = tmp_path / "matrix.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as error:
        load(file, tmp_path)
    assert str(error.value).startswith(f"--config: {file}: {said}")


def test_a_mapping_may_go_on_from_another(tmp_path: Path, write: Write) -> None:
    file = write(blocks="BLOCKS")
    file.write_text(
        file.read_text().replace("BLOCKS", "{a: {cells: {x: &x {rl_weight: 2}, y: {<<: *x, rl_weight: 1}}}}")
    )
    assert list(load(file, tmp_path).blocks[0].cells) == ["x", "y"]


CELL = {"grid": {"rl_weight": [0.1, 1]}}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"block": {}}, "the matrix: unknown key 'block' (did you mean 'blocks'?)"),
        ({"blocks": {}}, "has no blocks"),
        ({"blocks": {"a": {}}}, "block a has no cells and no grid"),
        ({"blocks": {"a": CELL | {"tabel": []}}}, "block a: unknown key 'tabel' (did you mean 'table'?)"),
        ({"blocks": {"a": {"cells": {"x": {"rl_wieght": 1}}}}}, "block a, cell 'x': unknown setting 'rl_wieght'"),
        ({"blocks": {"a": {"cells": {"x": {"rl_weight": -1}}}}}, "block a, cell 'x': --rl_weight must be at least 0"),
        ({"blocks": {"a": {"cells": {"x": {"rl": "refll"}}}}}, "cell 'x': unknown objective 'refll'"),
        ({"blocks": {"a": {"cells": {"x": {"rl": "grpo", "num_inference_steps": 1}}}}}, "cell 'x': --rl grpo"),
        (
            {"blocks": {"a": {"cells": {"x": {"seed": 1}}}}},
            "a cell may not set 'seed': the matrix sets it (from seeds)",
        ),
        ({"blocks": {"a": {"cells": {"x": {"start": "here"}}}}}, "cell 'x': start must be stage1"),
        ({"blocks": {"a": {"cells": {"x": {"stage1_steps": 0, "start": "export"}}}}}, "cell 'x': start is export, but"),
        (
            {"blocks": {"a": {"cells": {"x": {"stage2_steps": 5}, "y": {}}}}},
            "block a: 'x' has 11 updates, but 'y' has",
        ),
        ({"blocks": {"a": CELL | {"claims": [{"higher": "x"}]}}}, "block a, claims: a claim needs higher, lower"),
        (
            {"blocks": {"a": CELL | {"claims": [{"higher": "x", "lower": "y", "metric": "recall"}]}}},
            "block a, claims: unknown cell 'x'",
        ),
        ({"blocks": {"a": CELL | {"stage1": {"rewrad": "toy"}}}}, "its stage 1: unknown setting 'rewrad'"),
        ({"seeds": []}, "seeds must be a list of whole numbers"),
        ({"seeds": [0, True]}, "seeds must be a list of whole numbers"),
        ({"seeds": [2**32]}, "seeds must be a list of whole numbers"),
        ({"settings": {"architecture": "x"}}, "settings: a cell may not set 'architecture': only dmdr-train"),
        ({"settings": {"model": "toy", "output_dir": "x"}}, "settings: a cell may not set 'output_dir'"),
        ({"settings": {"model": "toy", "rl": "refl"}}, "cell 'stage 1': num_eval_samples is 0"),
        (
            {"settings": {"model": "digit", "rl": "refl"}},
            "cell 'stage 1': --model digit is neither a diffusers pipeline folder (no model_index.json), nor a hub id, "
            "nor a registered model (did you mean 'digits'?)",
        ),
        ({"blocks": {"a": {"cells": {"x": {"prompts": "gone.txt"}}}}}, "cell 'x': --prompts: no such file: gone.txt"),
        ({"blocks": {"a": {"cells": {"x": {"backend": "nope"}}}}}, "cell 'x': unknown backend 'nope'"),
        (
            {"blocks": {"a": {"cells": {"x": {"backend": "gone.py:X"}}}}},
            "cell 'x': 'gone.py:X' cannot be imported: ",
        ),
        (
            {"blocks": {"a": {"cells": {"x": {"report_to": "wandbb"}}}}},
            "cell 'x': --report_to: accelerate has no tracker 'wandbb'",
        ),
        (
            {"blocks": {"a": CELL | {"stage1": {"report_to": "wandbb"}}}},
            "its stage 1: --report_to: accelerate has no tracker 'wandbb'",
        ),
        ({"noise": {"recal": 1}}, "noise: unknown metric 'recal' (did you mean 'recall'?)"),
        ({"blocks": {"a": {"cells": {"x": {}, "y": {}}}}}, "block a: 'x' and 'y' are the same run"),
        (
            {"blocks": {"a": {"cells": {"x": {}}, "stage1": {"num_eval_samples": 4}}}},
            "block a: 'x' has 8 samples, but the stage 1 of 'x' has 4",
        ),
        (
            {"blocks": {"a": {"cells": {"x": {"stage2_steps": 0, "reward_tilt": 2}}, "stage1": {"reward_tilt": 0}}}},
            "cell 'x' is a stage 1; set 'reward_tilt' in the block's stage1 instead",
        ),
    ],
    ids=str,
)
def test_what_is_refused(tmp_path: Path, write: Write, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(**changes), tmp_path)
    assert said in str(error.value)


def test_real_images_that_are_missing_are_refused_before_the_first_run(tmp_path: Path, write: Write) -> None:
    """Of a model that has none of its own, which its other cells do not read."""
    sd3.build(tmp_path / "sd3")
    (tmp_path / "prompts.txt").write_text("seven\n")
    own = {"model": str(tmp_path / "sd3"), "prompts": str(tmp_path / "prompts.txt"), "num_eval_samples": 4}
    own |= {"rl": "none", "reward": "toy"}
    load(write(settings=own, blocks={"a": {"cells": {"x": {}}}}), tmp_path)
    for given, said in (
        ({}, "matching dmd2 reads real images: give"),
        ({"real_images": "gone"}, "real_images: no such folder"),
    ):
        with pytest.raises(ConfigError, match=f"cell 'x': --{said}"):
            load(write(settings=own, blocks={"a": {"cells": {"x": {"matching": "dmd2"} | given}}}), tmp_path)


ONE = {"cells": {"x": {}, "y": {"rl_weight": 1}}}
CLAIM = {"higher": "x", "lower": "y", "metric": "reward/total"}


@pytest.mark.parametrize(
    ("block", "said"),
    [
        ([], "block a must be a mapping, not []"),
        ({"cells": {"x": "refl"}}, "block a, cell 'x' must be a mapping, not 'refl'"),
        ({"cells": {"x": ["refl"]}}, "block a, cell 'x' must be a mapping, not ['refl']"),
        ({"cells": ["x"]}, "block a, cells must be a mapping, not ['x']"),
        (ONE | {"settings": ["rl"]}, "block a, settings must be a mapping, not ['rl']"),
        (ONE | {"stage1": ["rl"]}, "block a, stage1 must be a mapping, not ['rl']"),
        (ONE | {"stage1": {"seed": 1}}, "block a, stage1: a cell may not set 'seed': the matrix sets it (from seeds)"),
        (ONE | {"stage1": {"dmd_weight": 2}}, "block a, stage1: 'dmd_weight' is a setting of stage 2"),
        ({"grid": ["dmd_weight"]}, "block a, grid must be a mapping, not ['dmd_weight']"),
        ({"grid": {"dmd_weight": 0.5}}, "block a, grid: dmd_weight must be a list, not 0.5"),
        ({"grid": {"rl": "refl"}}, "block a, grid: rl must be a list, not 'refl'"),
        (ONE | {"grid": {"rl": []}}, "block a, grid: rl has no values"),
        (
            {"cells": {"rl_weight 0.1": {"rl": "none"}}, "grid": {"rl_weight": [0.1]}},
            "block a: two cells are called 'rl_weight 0.1'",
        ),
        ({"cells": {1: {}, "1": {"rl": "none"}}}, "block a: two cells are called '1'"),
        (ONE | {"curves": "reward/total"}, "block a, curves must be a list, not 'reward/total'"),
        (ONE | {"curves": ["reward/totl"]}, "block a, curves: unknown metric 'reward/totl' (did you mean 'reward/to"),
        (ONE | {"table": ["foo"]}, "block a, table: unknown metric 'foo'"),
        (ONE | {"table": [["foo"]]}, "block a, table: unknown metric '['foo']'"),
        (ONE | {"claims": CLAIM}, "block a, claims must be a list, not {"),
        (ONE | {"claims": ["x above y"]}, "block a, claims must be a mapping, not 'x above y'"),
        (ONE | {"claims": [CLAIM | {"higher": ["jont"]}]}, "block a, claims: higher must be text, not ['jont']"),
        (ONE | {"claims": [CLAIM | {"higher": "z"}]}, "block a, claims: unknown cell 'z'"),
        (
            ONE | {"claims": [CLAIM | {"until": "ten"}]},
            "block a, claims: until must be a whole number of at least 1, not 'ten'",
        ),
        (ONE | {"claims": [CLAIM | {"until": True}]}, "claims: until must be a whole number of at least 1, not True"),
        (
            ONE | {"claims": [CLAIM | {"metric": "reward/totl"}]},
            "block a, claims, cell 'x': unknown metric 'reward/totl' (did you mean 'reward/total'?)",
        ),
        (ONE | {"claims": [CLAIM | {"noise": -1}]}, "block a, claims: noise must be a number of at least 0, not -1"),
        (ONE | {"claims": [CLAIM | {"noise": "5"}]}, "block a, claims: noise must be a number of at least 0, not '5'"),
        (ONE | {"claims": [CLAIM | {"lower": "x"}]}, "block a, claims: 'x' is compared with itself"),
        (
            ONE | {"claims": [CLAIM | {"until": 3}]},
            "block a, claims, 'x' above 'y' in reward/total until 3: 'x' is first evaluated after 4 updates",
        ),
        (ONE | {"claims": [CLAIM | {"until": 11}]}, "in reward/total until 11: 'x' has only 10 updates; lower until"),
        (  # 'x' and 'y' go on from a stage 1 of 6 updates, after which they are first evaluated at 10
            ONE | {"claims": [CLAIM | {"until": 9}]},
            "in reward/total until 9: up to until both cells are the same run, stage1-seed0-",
        ),
        (
            {"cells": {"x": {"stage2_steps": 0}, "y": {}}, "claims": [CLAIM | {"until": 6}]},
            "in reward/total until 6: up to until both cells are the same run, stage1-seed0-",
        ),
        (
            {"cells": {"x": {"stage2_steps": 0}, "y": {}}, "claims": [CLAIM | {"until": 8}]},
            "in reward/total until 8: 'x' has only 6 updates; lower until",
        ),
        (
            {"cells": {"x": {}, "y": {"eval_steps": 2}}, "claims": [CLAIM | {"until": 10}]},
            "in reward/total until 10: the two cells are evaluated after different updates: make eval_steps",
        ),
        (  # of which only one of the two has this reward
            {
                "cells": {"x": {}, "y": {"rl": "none", "reward": "none"}},
                "claims": [CLAIM],
            },
            "block a, claims, cell 'y': unknown metric 'reward/total'",
        ),
        (
            {"cells": {"x": {}, "y": {"rl": "none", "reward": "none", "reward_tilt": 0}}},
            "cell 'y': unknown setting 'reward_tilt' (sample weight with this flag: rt_dm; this run uses none)",
        ),
    ],
    ids=str,
)
def test_a_block_that_cannot_be_meant(tmp_path: Path, write: Write, block: Any, said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(write(blocks={"a": block}), tmp_path)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise": 5}, "noise must be a mapping, not 5"),
        ({"noise": {"recall": -1}}, "noise: recall must be a number of at least 0, not -1"),
        ({"settings": ["a"]}, "settings must be a mapping, not ['a']"),
        ({"blocks": ["a"]}, "blocks must be a mapping, not ['a']"),
        ({"quick": ["a"]}, "quick must be a mapping, not ['a']"),
        ({"quick": {"settings": [1]}}, "quick: settings must be a mapping, not [1]"),
        ({"quick": {"blocks": "three"}}, "quick: blocks must be a list, not 'three'"),
        ({"quick": {"blocks": [["three"]]}}, "quick: blocks: unknown block '['three']'"),
        ({"quick": {"blocks": ["tree"]}}, "quick: blocks: unknown block 'tree' (did you mean 'three'?)"),
        ({"quick": {"seeds": 0}}, "quick: seeds must be a list of whole numbers from 0 to 2**32 - 1, not 0"),
        ({"quick": {"settings": {"seed": 1}}}, "quick: settings: a cell may not set 'seed'"),
        (
            {"quick": {"settings": {"stage2_stpes": 1}}},
            "quick: block three, cell 'stage 1': unknown setting 'stage2_st",
        ),
        ({"blocks": {"a/b": ONE}}, "block a/b: write its name with letters, digits"),
        ({"blocks": {1: ONE}}, "block 1: write its name with letters, digits"),
    ],
    ids=str,
)
@pytest.mark.parametrize("quick", [False, True])
def test_a_matrix_that_cannot_be_meant(
    tmp_path: Path, write: Write, changes: dict[str, Any], said: str, quick: bool
) -> None:
    """What `quick` says is wrong whether or not it is asked for."""
    with pytest.raises(ConfigError) as error:
        load(write(**({"quick": {"seeds": [0]}} | changes)), tmp_path, quick=quick)
    assert said in str(error.value)


@pytest.mark.parametrize("nothing", [None, {}, {"settings": None}])
def test_a_quick_look_is_something_else(tmp_path: Path, write: Write, nothing: Any) -> None:
    file = write(quick=nothing)
    load(file, tmp_path)
    with pytest.raises(ConfigError) as error:
        load(file, tmp_path, quick=True)
    assert str(error.value) == f"--quick: {file} has no quick section (seeds, settings, blocks)"


def test_early_updates_of_two_first_stages_may_be_compared(tmp_path: Path, write: Write) -> None:
    content = {"cells": {"x": {}, "y": {"reward_tilt": 0}}, "claims": [CLAIM | {"until": 4}]}
    assert [claim.until for claim in load(write(blocks={"a": content}), tmp_path).blocks[0].claims] == [4]


def test_noise_is_the_claims_own_or_the_matrixs(tmp_path: Path, write: Write) -> None:
    claims = [CLAIM, CLAIM | {"noise": 0.5}, CLAIM | {"metric": "recall"}, CLAIM | {"noise": None}]
    file = write(blocks={"a": ONE | {"claims": claims}}, noise={"reward/total": 2})
    assert [claim.noise for claim in load(file, tmp_path).blocks[0].claims] == [2, 0.5, 0, 2]


def test_an_empty_entry_is_as_if_left_out(tmp_path: Path, write: Write) -> None:
    keys = ("title", "text", "settings", "stage1", "start", "grid", "curves", "table", "claims")
    quick = {"seeds": [0], "blocks": None, "settings": None}
    file = write(blocks={"a": {"cells": {"x": None}} | dict.fromkeys(keys)}, quick=quick)
    block, short = load(file, tmp_path).blocks[0], load(file, tmp_path, quick=True).blocks[0]
    assert block == short
    assert (block.title, block.text, list(block.cells), block.claims) == ("a", "", ["x"], [])


def test_what_only_stage_2_reads() -> None:
    names = [field.name for field in dataclasses.fields(Config)]
    assert set(runs.STAGE2) == {n for n in names if n.startswith(("stage2_", "rl")) or n == "dmd_weight"}


def test_a_quoted_number_is_that_number(tmp_path: Path, write: Write) -> None:
    """YAML's "0" is the 0 that the flag would be."""
    found = [load(write(blocks={"a": {"cells": {"x": {"stage2_steps": zero}}}}), tmp_path) for zero in (0, "0")]
    assert [run.name for run in found[0].runs] == [run.name for run in found[1].runs]
    assert found[1].runs[0].stage == "stage 1"


BEST = """
from dataclasses import dataclass
from dmdr_refl import ReFL

@dataclass
class Best(ReFL):
    pass
"""


JUDGE = """
from dataclasses import dataclass
from dmdr.backends.toy import Redness

@dataclass
class Judge(Redness):
    checkpoint: str | None = None
"""


def test_a_changed_plugin_is_another_run(tmp_path: Path, write: Write) -> None:
    """Of a file, as of a setting; its stage 1 does not use it."""
    plugin = tmp_path / "some" / "best.py"
    plugin.parent.mkdir()
    plugin.write_text(BEST)
    file = write(blocks={"a": {"cells": {"x": {"rl": f"0.5*{plugin}:Best"}}}})
    first, old = load(file, tmp_path).runs
    assert old.name.startswith("stage2_0.5xbest_Best-seed0-")
    assert [run.name for run in load(file, tmp_path).runs] == [first.name, old.name]
    plugin.write_text(BEST + "# other\n")
    again, new = load(file, tmp_path).runs
    assert again.name == first.name
    assert new.name != old.name


def test_labels_and_metrics_call_a_plugin_by_its_stem(tmp_path: Path, write: Write) -> None:
    plugin = tmp_path / "judge.v1.py"
    plugin.write_text("def score(images):\n    return [0.0] * len(images)\n")
    name = f"{plugin}:score"
    content = {
        "settings": {"rl": "none"},
        "grid": {"reward": [f"0.5*{name}+toy", "toy"]},
        "curves": [f"reward/{name}"],
    }
    matrix = load(write(blocks={"a.b": content}), tmp_path)
    assert list(matrix.blocks[0].cells) == ["reward 0.5*judge.v1:score+toy", "reward toy"]
    assert metrics.metric(f"reward/{name}").label == "trained judge.v1:score"
    report.write_report(matrix, tmp_path, {})
    plots = sorted(path.name for path in (tmp_path / "plots").iterdir())
    assert [plot.startswith("a.b-reward-") for plot in plots] == [True, True]
    assert [plot.endswith(f"judge.v1.py-score.{kind}") for plot, kind in zip(plots, ("png", "svg"), strict=True)]


def test_a_long_name_ends_with_a_whole_setting(tmp_path: Path, write: Write) -> None:
    settings = {"dmd_weight": 0.123456789, "rl_weight": 0.123456789, "rt_dm_reward_tilt": 2.123456789}
    cell = settings | {"dyna_guidance": 0.123456789, "num_inference_steps": 3, "guidance_scale": 1.23456789}
    run = load(write(blocks={"a": {"cells": {"x": cell}}}), tmp_path).runs[-1]
    words = run.name.split("-")[1:-2]
    full = {"reward_tilt": "rt_dm_reward_tilt"}
    said = [f"{full.get(key, key)}_{float(cell[key]) if key != 'num_inference_steps' else 3}" for key in cell]
    assert words == said[: len(words)]
    assert 2 <= len(words) < len(cell)


def test_bad_input_is_one_line_and_nothing_written(tmp_path: Path, write: Write) -> None:
    file = write(blocks={"a": {"cells": {"x": {"rl_wieght": 1}}}})
    call = [*COMMAND, "--config", str(file), "--output_dir", str(tmp_path / "out")]
    found = subprocess.run(call, capture_output=True, text=True, cwd=ROOT)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.count("\n") == 1
    assert "cell 'x': unknown setting 'rl_wieght' (did you mean 'rl_weight'?)" in found.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--jobs", "x"], "--jobs: invalid int value: 'x'"),
        (["--jobs", "0"], "--jobs must be at least 1, not 0"),
        (["--job_s"], "unrecognized arguments: --job_s"),
        (["--quic"], "unrecognized arguments: --quic"),
        (["--dry_run", "--report_only"], "--report_only: not allowed with argument --dry_run"),
        (["--output_dir", "file"], "--output_dir file is no folder, or you may not write into it"),
        (["--output_dir", "/dev/null/x"], "--output_dir /dev/null/x is no folder, or you may not write into it"),
        (
            ["--output_dir", "/proc/foo", "--dry_run"],
            "--output_dir /proc/foo is no folder, or you may not write into it",
        ),
        (
            ["--report_only"],
            "--report_only: runs/ablation holds no run of this matrix; leave out --report_only to train",
        ),
    ],
    ids=str,
)
def test_a_bad_flag_is_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["examples.ablation_matrix", "--config", str(TOY), *flags])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    Path("file").touch()
    assert command.main() == 2
    assert capsys.readouterr() == ("", f"ablation_matrix: {said}\n")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


@pytest.mark.parametrize("package", ["scipy", "matplotlib", "jinja2"])
def test_what_the_report_needs_is_said_first(tmp_path: Path, package: str) -> None:
    """Not after hours of training."""
    (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('gone', name='{package}')")
    path = os.pathsep.join([str(tmp_path), *sys.path])
    call = [*COMMAND, "--config", str(TOY), "--output_dir", str(tmp_path / "out")]
    found = subprocess.run(call, capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": path})
    said = f"ablation_matrix: the report needs the package '{package}': pip install {package}\n"
    assert (found.returncode, found.stdout, found.stderr) == (2, "", said)
    assert not (tmp_path / "out").exists()


# ---- what is done and what is left


def finish(run: runs.Run, root: Path, reward: float = 0.5, log: str = "") -> Path:
    """A run folder as a finished run leaves it."""
    folder = run.folder(root)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(run.settings.as_yaml())
    column = {"reward/toy": reward, "reward/total": reward, "eval_reward/toy": 0.4, "eval_reward/total": 0.4}
    (folder / "evaluation.json").write_text(json.dumps({"samples": 8, "columns": {run.stage: column}}))
    (folder / "metrics.jsonl").write_text(log)
    (folder / "report.html").touch()
    return folder


def checkpoint(run: runs.Run, root: Path) -> None:
    folder = run.folder(root) / "checkpoints" / "step-000002"
    folder.mkdir(parents=True)
    (folder / "progress.json").write_text('{"stage": 1, "step": 2, "total": 2, "prompts_consumed": 16}')


def test_only_a_complete_run_of_the_same_settings_is_finished(tmp_path: Path, toy: Matrix) -> None:
    run = toy.runs[1]
    assert run.state(tmp_path) == "new"
    folder = finish(run, tmp_path)
    assert run.state(tmp_path) == "finished"
    for name in ("report.html", "evaluation.json", "config.yaml"):
        content = (folder / name).read_text()
        (folder / name).unlink()
        assert run.state(tmp_path) == "new", name
        (folder / name).write_text(content[: len(content) // 2])  # torn
        assert run.state(tmp_path) == ("finished" if name == "report.html" else "new")
        (folder / name).write_text(content)
    (folder / "evaluation.json").write_text('{"samples": 8, "columns": {"stage 1": {}}}')
    assert run.state(tmp_path) == "new"  # its own stage is missing
    checkpoint(run, tmp_path)
    assert run.state(tmp_path) == "begun"
    (folder / "config.yaml").write_text(run.settings.as_yaml().replace("rl_weight: 0.3", "rl_weight: 0.4"))
    assert run.state(tmp_path) == "new"


def test_a_matrix_may_be_moved(tmp_path: Path, toy: Matrix) -> None:
    finish(toy.runs[0], tmp_path)
    finish(toy.runs[1], tmp_path)
    os.rename(tmp_path / "cells", tmp_path / "moved")
    (tmp_path / "elsewhere").mkdir()
    os.rename(tmp_path / "moved", tmp_path / "elsewhere" / "cells")
    moved = load(TOY, tmp_path / "elsewhere")
    assert [run.state(tmp_path / "elsewhere") for run in moved.runs[:2]] == ["finished"] * 2


def test_what_is_left_goes_on_or_begins_anew(tmp_path: Path, toy: Matrix) -> None:
    first, begun, half, *_ = toy.runs
    kept = finish(first, tmp_path)
    (finish(begun, tmp_path) / "report.html").unlink()
    checkpoint(begun, tmp_path)
    (finish(half, tmp_path) / "report.html").unlink()
    command.clear(toy, tmp_path)
    assert kept.is_dir() and begun.folder(tmp_path).is_dir() and not half.folder(tmp_path).exists()
    todo = {task.name: task for task in command.tasks(toy, tmp_path)}
    assert list(todo) == ["build-toy-pipeline", *(run.name for run in toy.runs[1:])]
    assert list(todo[begun.name].arguments)[-2:] == ["--resume_from_checkpoint", "latest"]
    assert "--resume_from_checkpoint" not in todo[half.name].arguments
    assert first.name in todo[half.name].needs  # which is done, so that nobody waits for it
    assert yaml.safe_load((tmp_path / "logs" / f"{half.name}.yaml").read_text()) == half.values()
    for run in toy.runs[1:]:
        finish(run, tmp_path) if not run.folder(tmp_path).exists() else (run.folder(tmp_path) / "report.html").touch()
    assert command.tasks(toy, tmp_path) == []


def test_a_run_waits_for_what_it_needs_alone(tmp_path: Path, write: Write) -> None:
    """A reward that cannot be built stops the runs that use it; a name with a path is a log of its own all the same."""
    judge = tmp_path / "judge.py"
    judge.write_text(JUDGE)
    cells = {"plain": {}, "judged": {"reward": f"{judge}:Judge"}}
    matrix = load(write(blocks={"a": {"cells": cells, "stage1": {"reward": "toy"}}}), tmp_path)
    todo = command.tasks(matrix, tmp_path)
    build = next(task for task in todo if "judge" in task.name)
    assert list(build.arguments) == ["build", "toy", "rewards", f"{judge}:Judge"] and "/" not in build.name
    users = [task.run for task in todo if build.name in task.needs]
    assert users == [matrix.blocks[0].cells["judged"][0]]


@pytest.mark.parametrize("change", [lambda file: file.write_text(BEST + "# other\n"), Path.unlink])
def test_a_plugin_that_changes_meanwhile_is_not_trained_by_its_old_name(
    tmp_path: Path, write: Write, change: Callable[[Path], object]
) -> None:
    plugin = tmp_path / "best.py"
    plugin.write_text(BEST)
    run = load(write(blocks={"a": {"cells": {"x": {"rl": f"{plugin}:Best"}}}}), tmp_path).runs[1]
    change(plugin)
    with command.locked(tmp_path) as lock:
        failed = command.work([command.Task("x", ["train"], run=run)], 1, tmp_path, lock)
    assert failed == {"x": "not begun: the file of its plugin has changed; start again"}
    assert not (tmp_path / "x.log").exists()


# ---- the pool

WORKER = """
import os, sys, time, pathlib
name, *rest = sys.argv[1:]
pathlib.Path(name).write_text(str(os.getpid()))
if "fail" in rest:
    print("first"); print("bar\\rwhat went wrong\\n"); sys.exit(3)
if "hang" in rest:
    while os.read(0, 1): pass
    pathlib.Path(name + "-left").touch()
    sys.exit(143)
time.sleep(0.2)
pathlib.Path(name + "-done").touch()
"""


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, str]]:
    """Runs tasks whose worker is a stub."""
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(command, "WORKER", (sys.executable, str(tmp_path / "worker.py")))
    monkeypatch.chdir(tmp_path)

    def work(*tasks: command.Task, jobs: int = 2) -> dict[str, str]:
        with command.locked(tmp_path) as lock:
            return command.work(tasks, jobs, tmp_path, lock)

    return work


def test_a_failure_is_reported_and_the_rest_goes_on(
    pool: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, bad = command.Task("first", ["first"]), command.Task("bad", ["bad", "fail"])
    waits, lost = command.Task("waits", ["waits"], ["first", "gone"]), command.Task("lost", ["lost"], ["bad"])
    failed, why = pool(bad, lost, first, waits), "exit code 3: what went wrong"
    assert failed == {"bad": why, "lost": f"not begun: bad has failed: {why}"}
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("]")[0] for line in lines] == [f"[{count}/4" for count in (1, 2, 3, 4)]
    assert sum(line.endswith(f"lost  not begun: bad has failed: {why}") for line in lines) == 1
    assert (tmp_path / "waits-done").exists() and not (tmp_path / "lost").exists()
    assert (tmp_path / "waits").stat().st_mtime >= (tmp_path / "first-done").stat().st_mtime


@pytest.mark.parametrize("jobs", [1, 3])
def test_so_many_at_a_time(pool: Any, tmp_path: Path, jobs: int) -> None:
    pool(*(command.Task(name, [name]) for name in "abc"), jobs=jobs)
    began = [(tmp_path / name).stat().st_mtime for name in "abc"]
    ended = [(tmp_path / f"{name}-done").stat().st_mtime for name in "abc"]
    together = max(sum(b <= moment < e for b, e in zip(began, ended, strict=True)) for moment in began)
    assert together == jobs


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_whatever_ends_the_pool_ends_its_tasks(
    pool: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: type[BaseException],
) -> None:
    sleep = time.sleep

    def interrupted(seconds: float) -> None:
        sleep(seconds)
        if (tmp_path / "a").exists() and (tmp_path / "b").exists():
            monkeypatch.setattr(command.time, "sleep", sleep)
            raise error

    monkeypatch.setattr(command.time, "sleep", interrupted)
    with pytest.raises(error):
        pool(*(command.Task(name, [name, "hang"]) for name in "abc"))
    said = "the runs save checkpoints (up to 60 s); run the same command again to go on\n"
    assert capsys.readouterr().err == said
    assert (tmp_path / "a-left").exists() and (tmp_path / "b-left").exists()  # in order, not killed
    assert not (tmp_path / "c").exists()
    for name in "ab":
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / name).read_text()), 0)


def test_one_deadline_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "PATIENCE", 1)
    deaf = [sys.executable, "-c", "import time; time.sleep(60)"]
    processes = [subprocess.Popen(deaf, stdin=subprocess.PIPE) for _ in range(4)]
    began = time.monotonic()
    command.end(processes)
    assert 1 <= time.monotonic() - began < 2
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 4


def test_one_matrix_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "PATIENCE", 1)
    with (
        command.locked(tmp_path),
        pytest.raises(ConfigError, match="another matrix uses it now"),
        command.locked(tmp_path),
    ):
        pass
    assert capsys.readouterr().err == f"waiting up to 1 s for another matrix that uses {tmp_path}\n"
    with command.locked(tmp_path):
        pass


def test_a_worker_ends_with_its_parent() -> None:
    wait = (
        "from examples.ablation_matrix import worker; import time, threading; "
        "threading.Thread(target=worker.end_with_parent).start(); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", wait], stdin=subprocess.PIPE, cwd=ROOT)
    time.sleep(0.5)
    assert process.poll() is None
    assert process.stdin
    process.stdin.close()
    assert process.wait(10) == -signal.SIGTERM


# ---- verdicts


NOISE = {"frechet_distance": 5.0}


def judged(high: list[float | None], low: list[float | None], metric: str = "eval_reward/total") -> results.Verdict:
    sides = {
        label: [None if value is None else Result({metric: value}) for value in values]
        for label, values in (("a", high), ("b", low))
    }
    return verdict(Claim("a", "b", metric, noise=NOISE.get(metric, 0.0)), sides)


@pytest.mark.parametrize(
    ("high", "low", "metric", "said"),
    [
        (
            [0.50, 0.51, 0.52],
            [0.46, 0.46, 0.47],
            "eval_reward/total",
            "reproduced: a above b in held-out reward by 0.047 ± 0.005 in 3 of 3 seeds (p = 0.003)",
        ),
        (
            [0.1, 0.2],
            [0.3, 0.4],
            "recall",
            "not reproduced: a below b in recall by 0.200 ± 0.000 in 2 of 2 seeds (p < 0.001)",
        ),
        (
            [0.5, 0.1],
            [0.4, 0.15],
            "recall",
            "inconclusive: a above b in recall by 0.025 ± 0.075 in 1 of 2 seeds (p = 0.398); "
            "the seeds differ too much to tell",
        ),
        (  # every seed agrees, and yet one of them is the whole margin
            [1.01, 0.01, 0.01],
            [0.0, 0.0, 0.0],
            "recall",
            "inconclusive: a above b in recall by 0.343 ± 0.500 in 3 of 3 seeds (p = 0.206); "
            "the seeds differ too much to tell",
        ),
        (
            [14.0, 13.0],
            [10.0, 9.5],
            "frechet_distance",
            "inconclusive: a above b in Frechet distance by 3.8 ± 0.2 in 2 of 2 seeds (p = 0.021); "
            "differences up to 5 are noise",
        ),
        (
            [90.0, 99.0],
            [10.0, 9.5],
            "frechet_distance",
            "reproduced: a above b in Frechet distance by 84.8 ± 4.8 in 2 of 2 seeds (p = 0.018)",
        ),
        (
            [0.5],
            [0.4],
            "recall",
            "one seed: a above b in recall by 0.100; two or more seeds are needed",
        ),
        (
            [0.5, None, 0.51],
            [0.4, 0.4, 0.4],
            "recall",
            "reproduced: a above b in recall by 0.105 ± 0.005 in 2 of 2 seeds (p = 0.015); "
            "seeds without both results: 1",
        ),
        (  # two of two, as half of all pure noise
            [0.5, 0.6],
            [0.4, 0.4],
            "recall",
            "inconclusive: a above b in recall by 0.150 ± 0.050 in 2 of 2 seeds (p = 0.102); "
            "the seeds differ too much to tell",
        ),
        ([None], [0.4], "recall", "not measured: a against b in recall: no seed has finished both cells"),
        (
            [0.4, 0.4],
            [0.4, 0.4],
            "recall",
            "inconclusive: a level with b in recall by 0.000 ± 0.000 in 0 of 2 seeds (p = 0.500); "
            "a difference that rounds to 0 shows nothing",
        ),
        (  # as sure as can be, and of no size
            [0.40041, 0.40042, 0.40043],
            [0.4, 0.4, 0.4],
            "recall",
            "inconclusive: a level with b in recall by 0.000 ± 0.000 in 3 of 3 seeds (p < 0.001); "
            "a difference that rounds to 0 shows nothing",
        ),
    ],
)
def test_verdicts(high: list[float | None], low: list[float | None], metric: str, said: str) -> None:
    assert str(judged(high, low, metric)) == said


def test_a_claim_about_early_updates_reads_the_curve() -> None:
    def result(*values: float) -> Result:
        return Result({"recall": 0.0}, {"recall": list(zip((10, 20, 30), values, strict=True))})

    sides = {"a": [result(0.3, 0.5, 0.0), result(0.4, 0.4, 0.0)], "b": [result(0.1, 0.1, 9.0)] * 2}
    found = verdict(Claim("a", "b", "recall", until=20), sides)
    said = "a above b in recall over the first 20 updates by 0.300 ± 0.000 in 2 of 2 seeds (p < 0.001)"
    assert (found.status, found.text) == ("reproduced", said)
    assert verdict(Claim("a", "b", "recall", until=5), sides).status == "not measured"


# ---- the report of what is there


def test_curves_go_on_from_those_of_stage_1(tmp_path: Path, toy: Matrix) -> None:
    first, run = toy.runs[0], toy.runs[1]

    def line(step: int, value: float) -> str:
        found = {"step": step, "seconds": 0.5, "eval/toy": value, "eval/total": value, "eval_reward/total": 0.25}
        return json.dumps(found) + "\n"

    finish(first, tmp_path, reward=0.3, log=line(4, 0.2) + '{"step": 6, "seconds": 0.5}\n')
    finish(run, tmp_path, reward=0.6, log=line(2, 0.5))
    found = results.read(run, tmp_path)
    assert found is not None
    assert found.curves["reward/total"] == [(4, 0.2), (6, 0.3), (8, 0.5), (10, 0.6)]
    assert found.curves["reward/toy"] == found.curves["reward/total"]
    assert dict(found.curves["reward_gap"]) == pytest.approx({4: -0.05, 6: -0.1, 8: 0.25, 10: 0.2})
    assert found.seconds == 1.0
    assert results.read(toy.runs[2], tmp_path) is None


def test_a_torn_log_is_read_as_far_as_it_goes(tmp_path: Path, toy: Matrix) -> None:
    run = toy.runs[0]
    log = finish(run, tmp_path) / "metrics.jsonl"
    log.write_text('{"step": 2, "seconds": 0.5}\n{"step": 3, "seconds": null}\n{"step": 4}\n{"step": 5, "sec')
    found = results.read(run, tmp_path)
    assert found is not None and found.seconds == 2.0
    log.unlink()
    found = results.read(run, tmp_path)
    assert found is not None and found.seconds == 0.0


def test_what_could_not_be_measured_is_no_number(tmp_path: Path, toy: Matrix) -> None:
    """A reward that judged none of the images has a mean of NaN."""
    run = toy.runs[0]
    finish(run, tmp_path, reward=float("nan"))
    found = results.read(run, tmp_path)
    assert found is not None and found.final == {"eval_reward/toy": 0.4, "eval_reward/total": 0.4}


def test_p_is_that_of_students_t() -> None:
    margins = [0.3, 0.1, 0.25, -0.05]
    assert results.by_chance(margins) == pytest.approx(stats.ttest_1samp(margins, 0, alternative="greater").pvalue)
    assert results.by_chance([-m for m in margins]) == pytest.approx(results.by_chance(margins))


def test_a_metric_that_finished_runs_lack_is_not_measured() -> None:
    finished = {"a": [Result({"recall": 0.5})], "b": [Result({})]}
    said = "not measured: a against b in recall: their evaluations do not measure it"
    assert str(verdict(Claim("a", "b", "recall"), finished)) == said


def test_only_known_metrics_have_a_better_direction() -> None:
    assert metrics.metric("eval_reward/hps") == metrics.Metric("held-out hps")
    for name in ("foo", "loss/dmd", "recall/x"):
        with pytest.raises(KeyError):
            metrics.metric(name)


def test_report_of_an_unfinished_matrix(tmp_path: Path, toy: Matrix) -> None:
    for run in toy.runs[:2]:
        finish(run, tmp_path)
    lines = report.write_report(toy, tmp_path, {})
    assert lines == ["three: not measured: RL only against joint in trained reward: no seed has finished both cells"]
    html = (tmp_path / "report.html").read_text()
    assert "2 of 4 runs" in html
    assert "Text with &lt;b&gt;markup&lt;/b&gt;." in html
    assert "http" not in html.replace("http-equiv", "").replace("http://www.w3.org", "")
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["run"], row["start"], row["seed"], row["updates"]) for row in rows] == [
        (toy.runs[0].name, "", "0", "6"), (toy.runs[1].name, toy.runs[0].name, "0", "10")
    ]  # fmt: skip
    assert rows[0]["cells"] == "three: stage 1"
    assert {"dmd_weight", "rl_weight", "reward/total", "eval_reward/total", "seconds"} <= rows[0].keys()
    assert "| RL only | 10 | 1 | 0.500 | 0.400 | 0.100 |" in (tmp_path / "table.md").read_text()
    names = {path.name for path in (tmp_path / "plots").iterdir()}
    assert names == {f"three-{m}.{kind}" for m in ("reward-total", "eval_reward-total") for kind in ("png", "svg")}


def test_a_cell_without_a_result_has_no_picture(tmp_path: Path, toy: Matrix) -> None:
    """An unfinished run holds a grid of the student that it began with."""
    (first, joint) = (toy.blocks[0].cells[label][0] for label in ("stage 1", "joint"))
    for run in (first, joint):
        finish(run, tmp_path)
        images.save(images.image_grid(torch.rand(4, 3, 8, 8)), run.folder(tmp_path) / "samples" / "step-000000.png")
    (joint.folder(tmp_path) / "report.html").unlink()
    report.write_report(toy, tmp_path, {})
    html = (tmp_path / "report.html").read_text()
    assert "Grid of samples: stage 1" in html and "Grid of samples: joint" not in html


def test_every_setting_that_varies_is_a_column(tmp_path: Path, write: Write) -> None:
    """By its long name, however an axis calls it, and if an objective's recipe sets it."""
    content = {
        "grid": {"rl": ["refl"], "steps": ["last", "any"]},
        "cells": {"grpo": {"rl": "grpo", "num_generations": 4}},
    }
    matrix = load(write(blocks={"a": content}), tmp_path)
    _, header = report.rows(matrix, dict.fromkeys(run.name for run in matrix.runs))
    assert {"rl", "refl_steps"} <= set(header)
    assert not {"seed", "init_student", "model", "grpo_beta"} & set(header[4:])


def test_what_an_objective_is_told_is_a_column(tmp_path: Path, write: Write) -> None:
    """One cell alone has it, so that no two differ in it."""
    content = {"cells": {"refl": {"steps": "last"}, "grpo": {"rl": "grpo", "num_generations": 4, "grpo_beta": 0.5}}}
    matrix = load(write(blocks={"a": content}), tmp_path)
    runs = matrix.runs
    table, header = report.rows(matrix, {run.name: Result({}) for run in runs})
    found = {column: [row[header.index(column)] for row in table] for column in ("refl_steps", "grpo_beta")}
    told = [run.settings.config.rl for run in runs]
    assert found["refl_steps"] == ["last" if rl == "refl" else "" for rl in told]
    assert found["grpo_beta"] == [0.5 if rl == "grpo" else "" for rl in told]
    assert not {"grpo_epsilon", "grpo_ratio"} & set(header)


def test_why_a_run_is_not_finished(tmp_path: Path, toy: Matrix) -> None:
    """In the report and the tables, a line each."""
    first, alone, joint, _ = toy.runs
    found = {}
    for name, failed in (("nothing", {}), ("failed", {alone.name: "exit code 1: <b>no</b> judge"})):
        report.write_report(toy, tmp_path, failed)
        found[name] = (tmp_path / "table.md").read_text(), (tmp_path / "report.html").read_text()
    assert "- stage 1, seed 0 is not finished: not begun\n" in found["nothing"][0]
    said = "- joint, seed 0 is not finished: not begun: its stage 1 is not finished, not begun\n"
    assert said in found["nothing"][0]
    assert "- RL only, seed 0 is not finished: exit code 1: <b>no</b> judge\n" in found["failed"][0]
    assert "<b>RL only, seed 0</b> is not finished: exit code 1: &lt;b&gt;no&lt;/b&gt; judge<" in found["failed"][1]

    for run in (first, alone):
        finish(run, tmp_path)
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"{joint.name}.log").write_text("begun\nno space left\n")
    report.write_report(toy, tmp_path, {})
    lines = [line for line in (tmp_path / "table.md").read_text().splitlines() if "not finished" in line]
    assert lines == [
        "- joint, seed 0 is not finished: the last line of its log is: no space left",
        "- rl_weight 0.3, seed 0 is not finished: the last line of its log is: no space left",  # the same run
        "- rl_weight 1.0, seed 0 is not finished: not begun",
    ]


def test_a_bar_in_a_name_ends_no_column(tmp_path: Path, write: Write) -> None:
    matrix = load(write(blocks={"a": {"cells": {"x|y": {}}, "table": ["recall"]}}), tmp_path)
    report.write_report(matrix, tmp_path, {})
    assert (
        "|  | updates | seeds | recall |\n|---|---|---|---|\n| x\\|y | 10 | 0 |  |\n"
        in (tmp_path / "table.md").read_text()
    )


def test_the_page_says_what_is_shared(tmp_path: Path, toy: Matrix) -> None:
    report.write_report(toy, tmp_path, {})
    words = " ".join((tmp_path / "report.html").read_text().split())
    assert "cells whose first stage is the same share one per seed" in words
    assert "A claim is reproduced (or not)" in words and "of the paper" not in words


def test_dry_run_lists_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.ablate(["--config", str(TOY), "--output_dir", str(tmp_path / "out"), "--dry_run"])
    found = capsys.readouterr().out
    assert "\n  stage 1 of RL only; joint: 6 updates, stage1-seed0-" in found
    assert found.endswith("4 runs with seeds [0]: 0 finished, 0 begun, 4 new\n")
    assert not (tmp_path / "out").exists()


GROUPED = """
from dataclasses import dataclass
from dmdr.protocols import Needs
from dmdr_refl import ReFL

@dataclass
class Grouped(ReFL):
    @property
    def needs(self):
        return Needs(reward=True, reward_grad=True, group_size=4)
"""


@pytest.mark.parametrize(("stage1", "count"), [({}, 2), ({"num_generations": 1}, 1)])
def test_groups_of_images_split_stage_1_unless_it_is_told(
    tmp_path: Path, write: Write, stage1: dict[str, int], count: int
) -> None:
    plugin = tmp_path / "grouped.py"
    plugin.write_text(GROUPED)
    cells = {"refl": {}, "grouped": {"rl": f"{plugin}:Grouped", "num_generations": 4}}
    matrix = load(write(blocks={"a": {"cells": cells, "stage1": stage1}}), tmp_path)
    listed = [line for line in command.listing(matrix, tmp_path).splitlines() if "  stage 1 of " in line]
    assert len(listed) == count
    assert (" of refl; grouped: " in listed[0]) == (count == 1)


def test_a_flag_of_an_objective_that_is_called_like_a_setting_is_not_that(tmp_path: Path, write: Write) -> None:
    """Alone, the name means the setting, which a stage 1 has, too; the flag has its full name only."""
    plugin = tmp_path / "rated.py"
    plugin.write_text(GROUPED.replace("Grouped(ReFL):", "Rated(ReFL):\n    learning_rate: float = 0.5\n"))
    cells: dict[str, Any] = {"refl": {}, "rated": {"rl": f"{plugin}:Rated"}, "told": {"rl": f"{plugin}:Rated"}}
    full = re.sub(r"\W", "_", f"{plugin}:Rated_learning_rate")
    cells["told"][full] = 2.0
    settings = {"learning_rate": 0.05, "num_generations": 4}
    matrix = load(write(blocks={"a": {"settings": settings, "cells": cells}}), tmp_path)
    starts = {run.start.name: run.start.settings.config.learning_rate for run in matrix.runs if run.start}
    assert list(starts.values()) == [0.05]
    assert matrix.told == {full}

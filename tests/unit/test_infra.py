"""The files of infra/ without a cluster: fields, references, commands, and what an image holds."""

from __future__ import annotations

import configparser
import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config
from yamllint import linter
from yamllint.config import YamlLintConfig

from pipeline.cli import _parser
from pipeline.config import load
from pipeline.engine.cluster import look
from pipeline.engine.placement import check
from stages.errors import ConfigError
from tests.bench.plan import Rates, assumed, plan, table
from tests.crd_fields import problems

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
LINT = YamlLintConfig(
    "{extends: default, rules: {line-length: {max: 100}, document-start: disable,"
    " braces: {max-spaces-inside: 0}, comments: {min-spaces-from-content: 1}}}"
)


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def walk(value: Any) -> Any:
    """Every mapping in ``value``."""
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from walk(item)
    elif isinstance(value, list):
        for item in value:
            yield from walk(item)


def pods() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, spec) for path in KUBERAY for spec in walk(read(path)) if "containers" in spec
    ]


def gib(quantity: str) -> float:
    assert quantity.endswith("Gi")
    return float(quantity.removesuffix("Gi"))


def command(line: str) -> list[str]:
    """``python -m pipeline …`` as the real command line reads it; its config is there. Returns its
    overrides."""
    words = shlex.split(line)
    assert Path(words[0]).name == "python" and words[1:3] == ["-m", "pipeline"], line
    options, rest = _parser().parse_known_args(words[3:])
    assert options.command in ("run", "schedule") and not rest
    assert options.config == "configs/cluster.yaml"
    assert (ROOT / options.config).is_file()
    overrides: list[str] = options.overrides
    return overrides


@pytest.mark.parametrize("path", sorted(INFRA.rglob("*.yaml")), ids=lambda path: path.name)
def test_yaml_is_clean(path: Path) -> None:
    assert [str(found) for found in linter.run(path.read_text(), LINT)] == []


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.name)
def test_every_field_is_known_to_the_crd(path: Path) -> None:
    manifest = read(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert list(problems(manifest, manifest["kind"])) == []
    assert path.stem == manifest["kind"].lower()


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"entryPoint": "x"}, ".spec.entryPoint: unknown field"),
        ({"entrypoint": 1}, ".spec.entrypoint: 1 is not of type str"),
        ({"activeDeadlineSeconds": True}, "True is not of type int"),
        ({"submissionMode": "Mode"}, "'Mode' is none of"),
        ({"clusterSelector": {"a": 1}}, ".spec.clusterSelector.a: 1 is not of type str"),
        ({"submitterPodTemplate": {"spec": {}}}, ".spec.containers: is missing"),
    ],
)
def test_the_table_finds_mistakes(change: dict[str, Any], found: str) -> None:
    manifest = read(INFRA / "kuberay/rayjob.yaml")
    manifest["spec"] |= change
    told = list(problems(manifest, "RayJob"))
    assert len(told) == 1 and found in told[0]


def test_pods_are_confined_and_bounded() -> None:
    assert len(pods()) == 5
    with_token = [
        pod["containers"][0]["name"]
        for _, pod in pods()
        if pod.get("automountServiceAccountToken") is not False
    ]
    assert with_token == ["ray-head"], "whose autoscaler asks for pods"
    for name, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True, name
        assert pod["securityContext"]["runAsUser"] > 0, name
        for box in pod["containers"]:
            assert box["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert {"cpu", "memory"} <= box["resources"]["limits"].keys(), name
            assert box["resources"]["requests"].keys() == box["resources"]["limits"].keys()
            tag = box["image"].rpartition(":")[2]
            assert re.fullmatch(r"\d+\.\d+\.\d+-(cpu|cuda)", tag), name


def test_nodes_have_probes_shared_memory_and_a_port_for_metrics() -> None:
    nodes = [pod for name, pod in pods() if name == "raycluster.yaml"]
    assert len(nodes) == 3
    environment = json.loads((INFRA / "runtime-env.json").read_text())["env_vars"]
    for pod in nodes:
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        (box,) = pod["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
        assert set(mounts.values()) == volumes.keys()
        shared, limits = volumes[mounts["/dev/shm"]]["emptyDir"], box["resources"]["limits"]
        assert shared["medium"] == "Memory"
        # Ray takes 30 % of the memory for objects, and a disk where so much shared memory is not
        # there; beyond 10 GB it takes less instead.
        assert gib(shared["sizeLimit"]) >= min(0.3 * gib(limits["memory"]), 10e9 / 2**30)
        on_disk = [
            v["emptyDir"]
            for v in pod["volumes"]
            if "medium" not in v.get("emptyDir", {"medium": ""})
        ]
        assert gib(limits["ephemeral-storage"]) > sum(gib(v["sizeLimit"]) for v in on_disk) > 0
        assert {"livenessProbe", "readinessProbe"} <= box.keys()
        told = {entry["name"]: entry.get("value") for entry in box["env"]}
        assert environment.items() <= told.items()
        assert Path(told["HF_HOME"]).parent == Path("/tmp") and "/tmp" in mounts
        assert {"containerPort": 8080, "name": "metrics"} in box["ports"]
    config = read(INFRA / "prometheus.yaml")
    assert "metrics" in str(config["scrape_configs"][0]["relabel_configs"])


def test_what_the_config_names_on_disk_is_mounted_on_every_node() -> None:
    config = read(ROOT / "configs/cluster.yaml")
    paths = set(re.findall(r'"(\.{0,2}/[^"]*)"', json.dumps(config)))
    assert {config["dev"], config["test"]} <= paths
    nodes = [pod for name, pod in pods() if name == "raycluster.yaml"]
    assert len(nodes) == 3
    for pod in nodes:
        claims = {v["name"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        (box,) = pod["containers"]
        mounts = [Path(m["mountPath"]) for m in box["volumeMounts"] if m["name"] in claims]
        for path in paths:
            assert any(mount in Path(path).parents for mount in mounts), path


def test_the_config_asks_for_what_the_cluster_grows_to() -> None:
    config = load(str(ROOT / "configs/cluster.yaml"))
    most = {"CPU": 0.0, "GPU": 0.0}
    nodes: list[dict[str, float]] = []
    for group in read(INFRA / "kuberay/raycluster.yaml")["spec"]["workerGroupSpecs"]:
        (box,) = group["template"]["spec"]["containers"]
        has = box["resources"]["limits"]
        cpus, gpus = float(has["cpu"]), float(has.get("nvidia.com/gpu", 0))
        most["CPU"] += group["maxReplicas"] * cpus
        most["GPU"] += group["maxReplicas"] * gpus
        # Of its memory Ray offers what is left beside the objects.
        memory = 0.7 * gib(has["memory"]) * 2**30
        nodes += [{"CPU": cpus, "GPU": gpus, "memory": memory}] * group["maxReplicas"]
    assert config.engine.grows_to == most
    fixed = config.engine.model_copy(update={"grows_to": None})
    check(config.model_copy(update={"engine": fixed}), nodes)
    kinds = read(INFRA / "aws.yaml")["available_node_types"]
    assert kinds["gpu"]["max_workers"] == most["GPU"]


def test_no_secret_has_a_value() -> None:
    for _, pod in pods():
        for box in pod["containers"]:
            for entry in box.get("env", []):
                secret = re.search("TOKEN|KEY|SECRET|PASSWORD", entry["name"])
                assert ("valueFrom" in entry) == bool(secret), entry
    text = "".join(p.read_text() for p in [*INFRA.rglob("*"), ROOT / ".dockerignore"] if _text(p))
    assert not re.search(r"AKIA[0-9A-Z]{16}|hf_[A-Za-z0-9]{20}|-----BEGIN", text)


def _text(path: Path) -> bool:
    return path.is_file() and path.suffix != ".png"


def test_jobs_run_on_the_cluster_that_is_there_by_the_tested_command() -> None:
    cluster = read(INFRA / "kuberay/raycluster.yaml")
    job = read(INFRA / "kuberay/rayjob.yaml")
    scheduled = read(INFRA / "kuberay/raycronjob.yaml")
    for manifest, spec in ((job, job["spec"]), (scheduled, scheduled["spec"]["jobTemplate"])):
        assert spec["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        assert manifest["metadata"]["namespace"] == cluster["metadata"]["namespace"]
        command(spec["entrypoint"])
    assert job["spec"]["entrypoint"] == "python -m pipeline run configs/cluster.yaml"
    assert " schedule " in scheduled["spec"]["jobTemplate"]["entrypoint"]
    (box,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    workdir = next(a for k, a in dockerfile() if k == "WORKDIR" and a != "/src")
    assert {"name": "config", "mountPath": f"{workdir}/configs", "readOnly": True} in box[
        "volumeMounts"
    ]


def test_the_cluster_has_the_versions_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    version = re.search(r"^ray==(.*)$", lock, re.MULTILINE)
    assert version
    assert read(INFRA / "kuberay/raycluster.yaml")["spec"]["rayVersion"] == version[1]


def test_the_cloud_cluster_is_what_rays_launcher_accepts() -> None:
    config = read(INFRA / "aws.yaml")
    whole = prepare_config(config)
    validate_config(whole)
    assert whole["setup_commands"] == [] and whole["head_node_type"] == "head"
    with pytest.raises(ValidationError, match="idle_minutes"):
        validate_config(whole | {"idle_minutes": 1})


def test_timers_fire_the_tested_command_on_one_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((INFRA / "systemd/capfilt.service").read_text().replace("\\\n", " "))
    service = unit["Service"]
    assert service["User"] != "root" and service["SuccessExitStatus"] == "75"
    overrides = command(service["ExecStart"])
    timer = configparser.ConfigParser(interpolation=None)
    timer.read(INFRA / "systemd/capfilt.timer")
    assert timer["Timer"]["Persistent"] == "true" and timer["Install"]["WantedBy"]
    lines = (INFRA / "capfilt.cron").read_text().splitlines()
    (line,) = [x for x in lines if x[:1] not in ("#", "") and not re.match(r"\w+=", x)]
    *when, user, rest = line.split(maxsplit=6)
    assert len(when) == 5 and user == "capfilt" and "%" not in rest
    (given,) = re.findall(r"^ONE_MACHINE=(.*)$", "\n".join(lines), re.MULTILINE)
    enter, make, fired = rest.split(" && ")
    fired, _, log = fired.replace("$ONE_MACHINE", given).partition(" >> ")
    assert command(fired) == overrides
    # Cron's shell opens the log before anything has made its folder.
    assert enter == f"cd {service['WorkingDirectory']}"
    assert make == f"mkdir -p {Path(log.split()[0]).parent}"
    # No address is given, so that a Ray of one machine starts, which has to be enough.
    config = load(str(ROOT / "configs/cluster.yaml"), overrides)
    assert [node["CPU"] for node in look(config.engine)] == [os.cpu_count()]  # this machine
    # Of 64 GiB a machine shows 62; with 12 in use and 8 for objects, Ray offers 42.
    check(config, [{"CPU": 8.0, "GPU": 1.0, "memory": 42.0 * (1 << 30)}])
    with pytest.raises(ConfigError, match="a local Ray does not grow"):
        look(load(str(ROOT / "configs/cluster.yaml")).engine)


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, argument) in order, continued lines joined."""
    text = (INFRA / "Dockerfile").read_text()
    kept = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(kept).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined.splitlines()]


def test_the_image_is_pinned_and_not_roots() -> None:
    steps = dockerfile()
    arguments = dict(a.split("=", 1) for k, a in steps if k == "ARG")
    assert re.fullmatch(r"3\.11\.\d+-slim-bookworm", arguments["PYTHON"])
    assert {a.split()[0] for k, a in steps if k == "FROM"} == {"python:${PYTHON}"}
    assert [a for k, a in steps if k == "USER"][-1] == "1000:1000"
    install = next(a for k, a in steps if k == "RUN" and "pip install -r" in a)
    assert "cpu)" in install and "cuda)" in install and arguments["VARIANT"] == "cuda"
    (pattern, pinned) = re.search(r"sed 's/(.*?)/(.*?)/'", install).groups()  # type: ignore[union-attr]
    pattern = pattern.replace(r"\(", "(").replace(r"\)", ")")
    lock = (ROOT / "requirements.lock").read_text()
    assert len(re.findall(pattern, lock, re.MULTILINE)) == 1
    assert "+cpu\n" in re.sub(pattern, pinned, lock, flags=re.MULTILINE)


def test_a_login_shell_of_the_image_finds_ray() -> None:
    """Ray's cluster launcher starts such shells, and /etc/profile sets their PATH."""
    steps = dockerfile()
    last = [step for step in steps if step[0] == "FROM"][-1]
    image = steps[steps.index(last) :]
    (path,) = re.findall(r"PATH=(\S+)", " ".join(a for k, a in image if k == "ENV"))
    (told,) = re.findall(
        r"echo 'export PATH=(\S+)' > /etc/profile\.d/\w+\.sh",
        " ".join(a for k, a in image if k == "RUN"),
    )
    assert told == path and path.endswith(":$PATH")


def test_the_context_holds_what_is_copied_and_little_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    assert ignore[1] == "*"
    let_in = {line[1:] for line in ignore if line.startswith("!")}
    copied = set()
    for kind, argument in dockerfile():
        if kind == "COPY" and "--from" not in argument:
            *sources, _ = [w for w in argument.split() if not w.startswith("--")]
            copied |= set(sources)
    assert copied == let_in
    for source in copied:
        assert (ROOT / source).exists()
    size = sum(
        file.stat().st_size
        for source in copied
        for file in [ROOT / source, *(ROOT / source).rglob("*")]
        if file.is_file() and not fnmatch(str(file), "*__pycache__*")
    )
    assert size < 4 << 20


def test_the_images_command_is_ours() -> None:
    last = dockerfile()[-1]
    words = yaml.safe_load(last[1])
    assert last[0] == "CMD" and words == ["python", "-m", "pipeline", "--help"]


def test_the_plan_in_the_readme_is_the_one_computed() -> None:
    text = (INFRA / "README.md").read_text()
    rates = Rates()
    assert table(rates) in text
    assert " ".join(assumed(rates).split()) in " ".join(text.split())


def test_the_plan_grows_with_its_size_and_shrinks_with_speed() -> None:
    small, large = plan(1e6, Rates()), plan(1e7, Rates())
    same = {
        "read for labelling, MB/s",
        "writes a second while labelling",
        "requests a second while labelling",
        "GPUs that take one core of the driver",
        "evaluation, hours on one GPU",
    }
    for name in small:
        factor = 1 if name in same else 10
        assert large[name] == pytest.approx(factor * small[name]), name
    simple = Rates(alive=1, caption=2, filter=4, embed=4, gpus=2)
    assert plan(7200, simple)["labelling, GPU-hours"] == pytest.approx(2.0)
    assert plan(7200, simple)["labelling, days on the GPUs"] == pytest.approx(1 / 24)
    # 7,200 images of one second each are one shard, for which the driver takes a tenth of a second.
    simple = Rates(alive=1, caption=2, filter=4, embed=4, shard_size=7200, gpus=2, driver=0.1)
    assert plan(7200, simple)["GPUs that take one core of the driver"] == pytest.approx(72_000)
    assert plan(7200, simple)["requests a second while labelling"] == pytest.approx(
        simple.requests / 3600
    )
    simple = Rates(probes=3600, k_test=1, itm=12, beam=1)
    assert plan(1, simple)["evaluation, hours on one GPU"] == pytest.approx(2 * 2 * (1 + 1))

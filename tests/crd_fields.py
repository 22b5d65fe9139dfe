"""The fields of Kubernetes and KubeRay that infra/kuberay uses, with their types, kept by hand.

From KubeRay v1.7.0 (ray-operator/apis/ray/v1, ray.io/v1) and Kubernetes v1.36 (core/v1).
A type is ``str``, ``int``, ``bool``, ``quantity`` (500m, 16Gi), ``port`` (number or name),
``{str}`` or ``{quantity}`` (a mapping to such values), the name of another table, or ``[T]``, a
list. ``!`` marks a field that must be there; after ``|`` stand the values that are allowed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

FIELDS: dict[str, dict[str, str]] = {
    "RayCluster": {"apiVersion!": "str", "kind!": "str", "metadata!": "Metadata"}
    | {"spec!": "RayClusterSpec"},
    "RayJob": {
        "apiVersion!": "str",
        "kind!": "str",
        "metadata!": "Metadata",
        "spec!": "RayJobSpec",
    },
    "RayCronJob": {"apiVersion!": "str", "kind!": "str", "metadata!": "Metadata"}
    | {"spec!": "RayCronJobSpec"},
    "Metadata": {"name!": "str", "namespace": "str", "labels": "{str}", "annotations": "{str}"},
    "RayClusterSpec": {
        "rayVersion": "str",
        "authOptions": "AuthOptions",
        "enableInTreeAutoscaling": "bool",
        "autoscalerOptions": "AutoscalerOptions",
        "headGroupSpec!": "HeadGroupSpec",
        "workerGroupSpecs": "[WorkerGroupSpec]",
    },
    "AuthOptions": {"mode": "str|disabled|token", "secretName": "str"},
    "AutoscalerOptions": {
        "version": "str|v1|v2",
        "idleTimeoutSeconds": "int",
        "upscalingMode": "str|Default|Aggressive|Conservative",
        "resources": "Resources",
        "securityContext": "SecurityContext",
    },
    "HeadGroupSpec": {
        "rayStartParams": "{str}",
        "serviceType": "str",
        "template!": "PodTemplate",
    },
    "WorkerGroupSpec": {
        "groupName!": "str",
        "replicas": "int",
        "minReplicas!": "int",
        "maxReplicas!": "int",
        "idleTimeoutSeconds": "int",
        "rayStartParams": "{str}",
        "template!": "PodTemplate",
    },
    "RayJobSpec": {
        "clusterSelector": "{str}",
        "entrypoint": "str",
        "runtimeEnvYAML": "str",
        "submissionMode": "str|K8sJobMode|HTTPMode|InteractiveMode|SidecarMode",
        "submitterPodTemplate": "PodTemplate",
        "activeDeadlineSeconds": "int",
    },
    "RayCronJobSpec": {
        "schedule!": "str",
        "timeZone": "str",
        "suspend": "bool",
        "jobTemplate!": "RayJobSpec",
    },
    "PodTemplate": {"metadata": "Metadata", "spec": "PodSpec"},
    "PodSpec": {
        "containers!": "[Container]",
        "volumes": "[Volume]",
        "restartPolicy": "str|Always|OnFailure|Never",
        "securityContext": "PodSecurityContext",
        "tolerations": "[Toleration]",
        "nodeSelector": "{str}",
        "serviceAccountName": "str",
        "automountServiceAccountToken": "bool",
    },
    "PodSecurityContext": {
        "runAsNonRoot": "bool",
        "runAsUser": "int",
        "runAsGroup": "int",
        "fsGroup": "int",
        "seccompProfile": "SeccompProfile",
    },
    "SeccompProfile": {"type!": "str|RuntimeDefault|Localhost|Unconfined"},
    "Toleration": {
        "key": "str",
        "operator": "str|Exists|Equal",
        "effect": "str|NoSchedule|PreferNoSchedule|NoExecute",
    },
    "Container": {
        "name!": "str",
        "image": "str",
        "ports": "[ContainerPort]",
        "env": "[EnvVar]",
        "envFrom": "[EnvFrom]",
        "resources": "Resources",
        "securityContext": "SecurityContext",
        "livenessProbe": "Probe",
        "readinessProbe": "Probe",
        "volumeMounts": "[VolumeMount]",
    },
    "ContainerPort": {"containerPort!": "int", "name": "str"},
    "EnvVar": {"name!": "str", "value": "str", "valueFrom": "EnvVarSource"},
    "EnvVarSource": {"secretKeyRef": "SecretKey"},
    "SecretKey": {"name": "str", "key!": "str", "optional": "bool"},
    "EnvFrom": {"secretRef": "SecretRef"},
    "SecretRef": {"name": "str", "optional": "bool"},
    "Resources": {"requests": "{quantity}", "limits": "{quantity}"},
    "SecurityContext": {"allowPrivilegeEscalation": "bool", "capabilities": "Capabilities"}
    | {"readOnlyRootFilesystem": "bool"},
    "Capabilities": {"drop": "[str]"},
    "Probe": {
        "httpGet": "HTTPGet",
        "initialDelaySeconds": "int",
        "periodSeconds": "int",
        "timeoutSeconds": "int",
        "failureThreshold": "int",
    },
    "HTTPGet": {"path": "str", "port!": "port"},
    "VolumeMount": {"name!": "str", "mountPath!": "str", "readOnly": "bool"},
    "Volume": {
        "name!": "str",
        "emptyDir": "EmptyDir",
        "configMap": "ConfigMap",
        "persistentVolumeClaim": "PersistentVolumeClaim",
    },
    "EmptyDir": {"medium": "str|Memory", "sizeLimit": "quantity"},
    "ConfigMap": {"name": "str", "optional": "bool"},
    "PersistentVolumeClaim": {"claimName!": "str", "readOnly": "bool"},
}

_QUANTITY = re.compile(r"\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?")
_PLAIN: dict[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "bool": (bool,)}


def problems(value: Any, kind: str, where: str = "") -> Iterator[str]:
    """What is wrong with ``value`` as a ``kind``, a line each."""
    kind, *allowed = kind.split("|")
    if kind.startswith("["):
        if not isinstance(value, list):
            yield f"{where}: not a list"
            return
        for place, item in enumerate(value):
            yield from problems(item, kind[1:-1], f"{where}[{place}]")
    elif kind.startswith("{"):
        if not isinstance(value, dict):
            yield f"{where}: not a mapping"
            return
        for key, item in value.items():
            yield from problems(item, kind[1:-1], f"{where}.{key}")
    elif kind in FIELDS:
        yield from _fields(value, FIELDS[kind], where)
    elif not _is(value, kind):
        yield f"{where}: {value!r} is not of type {kind}"
    elif allowed and value not in allowed:
        yield f"{where}: {value!r} is none of {allowed}"


def _fields(value: Any, known: dict[str, str], where: str) -> Iterator[str]:
    if not isinstance(value, dict):
        yield f"{where}: not a mapping"
        return
    types = {name.rstrip("!"): kind for name, kind in known.items()}
    for name in (name.rstrip("!") for name in known if name.endswith("!")):
        if name not in value:
            yield f"{where}.{name}: is missing"
    for name, item in value.items():
        if name in types:
            yield from problems(item, types[name], f"{where}.{name}")
        else:
            yield f"{where}.{name}: unknown field"


def _is(value: Any, kind: str) -> bool:
    if kind == "quantity":
        return isinstance(value, str) and _QUANTITY.fullmatch(value) is not None
    if kind == "port":
        return isinstance(value, int | str) and not isinstance(value, bool)
    return isinstance(value, _PLAIN[kind]) and isinstance(value, bool) == (kind == "bool")

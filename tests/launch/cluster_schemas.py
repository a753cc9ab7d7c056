"""What the cluster files may hold: the part of each tool's own schema that they use, unknown keys refused.

JobSet: the v1alpha2 resource of the JobSet controller. Pod and job parts: Kubernetes 1.33. SkyPilot: the task schema of
0.14.
"""

from typing import Any

WORD = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
NAME = {"type": "string", "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", "maxLength": 63}


def strict(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


def listed(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "minItems": 1, "items": item}


_CONTAINER = strict(
    ["name", "image"],
    name=NAME,
    image=WORD,
    workingDir=WORD,
    command=listed(WORD),
    args=listed(WORD),
    env=listed(strict(["name", "value"], name=WORD, value={"type": "string"})),  # numbers must be quoted
    resources=strict([], limits={"type": "object"}, requests={"type": "object"}),
    volumeMounts=listed(strict(["name", "mountPath"], name=NAME, mountPath={"type": "string", "pattern": "^/"})),
)
_VOLUME = strict(
    ["name"],
    name=NAME,
    persistentVolumeClaim=strict(["claimName"], claimName=NAME),
    emptyDir=strict([], medium={"enum": ["", "Memory"]}, sizeLimit=WORD),
)
_POD = strict(
    ["containers", "restartPolicy"],
    restartPolicy={"enum": ["Never", "OnFailure"]},  # a job takes no other
    terminationGracePeriodSeconds=COUNT,
    containers=listed(_CONTAINER),
    volumes=listed(_VOLUME),
)
_JOB = strict(
    ["template"],
    parallelism=COUNT,
    completions=COUNT,
    completionMode={"enum": ["Indexed", "NonIndexed"]},
    backoffLimit=COUNT,
    template=strict(["spec"], metadata={"type": "object"}, spec=_POD),
)
JOBSET = strict(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=strict(["name"], name=NAME, labels={"type": "object"}, annotations={"type": "object"}),
    spec=strict(
        ["replicatedJobs"],
        failurePolicy=strict([], maxRestarts=COUNT),
        network=strict(
            [], enableDNSHostnames={"type": "boolean"}, publishNotReadyAddresses={"type": "boolean"}, subdomain=NAME
        ),
        replicatedJobs=listed(
            strict(["name", "template"], name=NAME, replicas=COUNT, template=strict(["spec"], spec=_JOB))
        ),
    ),
)
SKY = strict(
    [],
    name=WORD,
    num_nodes={"type": "integer", "minimum": 1},
    workdir=WORD,
    resources=strict(
        [],
        accelerators={"type": "string", "pattern": r"^[A-Za-z0-9_-]+:\d+$"},
        use_spot={"type": "boolean"},
        disk_size={"type": "integer"},
        network_tier={"enum": ["best", "standard"]},
    ),
    volumes={"type": "object", "propertyNames": {"pattern": "^/"}, "additionalProperties": WORD},
    envs={"type": "object", "additionalProperties": {"type": ["string", "null"]}},
    setup=WORD,
    run=WORD,
)

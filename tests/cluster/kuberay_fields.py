"""The fields of KubeRay's `ray.io/v1` objects, and those of the pods inside them that are used here, with their types.

From the CRD reference of KubeRay 1.7. A mapping lists every key that may stand there; a list has the form of its
members; `dict` is a mapping of strings to strings whose keys are free.
"""

QUANTITIES = {"limits": dict, "requests": dict}
NAMED_VALUE = {"name": str, "value": str, "valueFrom": {"secretKeyRef": {"name": str, "key": str}}}
CONTAINER = {
    "name": str,
    "image": str,
    "env": [NAMED_VALUE],
    "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
    "ports": [{"containerPort": int, "name": str}],
    "resources": QUANTITIES,
    "volumeMounts": [{"mountPath": str, "name": str, "readOnly": bool}],
}
POD = {
    "metadata": {"labels": dict, "annotations": dict},
    "spec": {
        "containers": [CONTAINER],
        "nodeSelector": dict,
        "serviceAccountName": str,
        "terminationGracePeriodSeconds": int,
        "tolerations": [{"key": str, "operator": str, "value": str, "effect": str}],
        "volumes": [{"name": str, "emptyDir": {"medium": str, "sizeLimit": str}}],
    },
}
CLUSTER = {
    "rayVersion": str,
    "authOptions": {"mode": str, "secretName": str, "enableK8sTokenAuth": bool},
    "enableInTreeAutoscaling": bool,
    "autoscalerOptions": {
        "version": str,
        "idleTimeoutSeconds": int,
        "upscalingMode": str,
        "image": str,
        "imagePullPolicy": str,
        "env": [NAMED_VALUE],
        "resources": QUANTITIES,
    },
    "gcsFaultToleranceOptions": {"redisAddress": str, "externalStorageNamespace": str},
    "headGroupSpec": {"serviceType": str, "enableIngress": bool, "rayStartParams": dict, "template": POD},
    "workerGroupSpecs": [
        {
            "groupName": str,
            "replicas": int,
            "minReplicas": int,
            "maxReplicas": int,
            "numOfHosts": int,
            "idleTimeoutSeconds": int,
            "suspend": bool,
            "rayStartParams": dict,
            "template": POD,
        }
    ],
    "suspend": bool,
}
JOB = {
    "entrypoint": str,
    "runtimeEnvYAML": str,
    "submissionMode": str,
    "backoffLimit": int,
    "activeDeadlineSeconds": int,
    "shutdownAfterJobFinishes": bool,
    "ttlSecondsAfterFinished": int,
    "entrypointNumCpus": float,
    "entrypointNumGpus": float,
    "metadata": dict,
    "clusterSelector": dict,
    "submitterPodTemplate": POD,
    "submitterConfig": {"backoffLimit": int},
    "suspend": bool,
    "rayClusterSpec": CLUSTER,
}
SERVICE = {
    "serveConfigV2": str,
    "rayClusterConfig": CLUSTER,
    "upgradeStrategy": {"type": str},
    "serviceUnhealthySecondThreshold": int,
    "deploymentUnhealthySecondThreshold": int,
    "excludeHeadPodFromServeSvc": bool,
    "rayClusterDeletionDelaySeconds": int,
}
SPECS = {"RayCluster": CLUSTER, "RayJob": JOB, "RayService": SERVICE}
METADATA = {"name": str, "namespace": str, "labels": dict, "annotations": dict}


def schema_errors(value, schema, path="spec"):
    """What in `value` is not as `form` says, a line for each."""
    if schema is dict:
        if not isinstance(value, dict):
            return [f"{path} is no mapping"]
        return [f"{path}.{key} is {part!r}, not a string" for key, part in value.items() if not isinstance(part, str)]
    if isinstance(schema, type):
        is_valid = isinstance(value, schema) and (schema is bool or not isinstance(value, bool))
        return [] if is_valid else [f"{path} is {value!r}, not of type {schema.__name__}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [line for i, part in enumerate(value) for line in schema_errors(part, schema[0], f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path} is no mapping"]
    unknown_keys = [f"{path}.{key} is not known" for key in value.keys() - schema.keys()]
    return unknown_keys + [
        line for key in value.keys() & schema.keys() for line in schema_errors(value[key], schema[key], f"{path}.{key}")
    ]

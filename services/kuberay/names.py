"""Names and labels that the objects of one windfarm share."""

from __future__ import annotations

NAMESPACE = "windfarm"
SERVICE = "windfarm"
"""The RayService, and the Service that clients use."""
ENVIRONMENT = "windfarm-environment"
INTERNAL_SECRET = "windfarm-internal"
STORES_SECRET = "windfarm-stores"
HUB_SECRET = "windfarm-hub"
"""Secrets are made by the operator of the cluster, never written here."""
DATA_CLAIM, MODELS_CLAIM = "windfarm-data", "windfarm-models"

LABELS: dict[str, str] = {"app.kubernetes.io/part-of": "windfarm"}
COMPONENT = "app.kubernetes.io/component"
HEAD, PLATFORM, MODELS = "head", "platform", "models"
CLIENT_LABEL = "windfarm/client"
"""Namespaces with this label (value "true") may call the public endpoint."""

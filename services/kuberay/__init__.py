"""Kubernetes manifests for KubeRay, made from a plan: what `windfarm plan --emit kuberay` writes."""

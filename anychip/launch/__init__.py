"""What starts a recipe on a cluster: scripts and manifests, checked before they are written."""

"""What a cluster needs: manifests for kustomize, and the two commands that prepare their secrets and bucket."""

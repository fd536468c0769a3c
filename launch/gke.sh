#!/usr/bin/env bash
# Trains on a TPU slice of Google Kubernetes Engine, with plain kubectl: an
# Indexed Job with a pod on every host of the slice, and a headless Service by
# which they find each other.
#
# usage: launch/gke.sh COMMAND FLAG... [-- FLAG_OF_EMPDG_TRAIN...]
#
# commands:
#   manifest   print the YAML
#   submit     apply it. Kubernetes itself starts again what was preempted or
#              lost its host
#   resume     for a Job that has ended, or that is to have another image or
#              other flags: delete it, wait until its pods are gone, submit
#   status     show the Job and its pods
#   logs       show the output of a worker's newest pod: --worker=N, --follow
#   delete     delete the Job and the Service; pods save and end
#
# flags:
#   --name=empdg           of the Job
#   --namespace=           of Kubernetes (kubectl's current one)
#   --image=               built from launch/Dockerfile (for manifest, submit,
#                          resume)
#   --accelerator=tpu-v5-lite-podslice
#   --topology=4x4         of the node pool; hosts = chips / chips_per_host
#   --chips_per_host=4
#   --workdir=             gs://BUCKET/PATH (for manifest, submit, resume)
#   --shared_disk          --workdir is a path that all pods share, for a Job
#                          into which you mount one
#   --config=configs/pod.py:CHIPS
#   --service_account=     of Kubernetes; it may write to the bucket
#   --max_restarts=10      after lost hosts; preemptions do not count
#   --worker=0 --follow    for logs
#   --dry_run              print the commands alone
#   --help                 this text
#
# It needs kubectl with access to a cluster of Kubernetes 1.31 or newer, and a
# TPU node pool of the accelerator and topology.
#
# examples:
#   launch/gke.sh manifest --image=IMAGE --workdir=gs://BUCKET/pod
#   launch/gke.sh submit --topology=4x8 --image=IMAGE --workdir=gs://BUCKET/pod
#   launch/gke.sh logs --follow
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=common.sh
source "$root/launch/common.sh"

name=empdg namespace='' image='' accelerator=tpu-v5-lite-podslice topology=4x4
chips_per_host=4 workdir='' shared_disk='' config='' service_account=''
max_restarts=10 worker=0 follow='' dry_run=''
parse_flags 'name namespace image accelerator topology chips_per_host workdir
 config service_account max_restarts worker' 'shared_disk follow dry_run' "$@"
if ! [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
  refuse "--topology=$topology: expected chips as in 4x4 or 2x2x4"
fi
need_number 1 chips_per_host
need_number 0 max_restarts worker
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]]; then
  refuse "--name=$name: expected small letters, digits and hyphens"
fi

chips=$((${topology//x/ * }))
((chips % chips_per_host == 0)) ||
  refuse "--topology=$topology has $chips chips, not a multiple of" \
    "--chips_per_host=$chips_per_host"
hosts=$((chips / chips_per_host))
: "${config:=configs/pod.py:$chips}"

kubectl_run() {
  run kubectl ${namespace:+"--namespace=$namespace"} "$@"
}

# A string of YAML in single quotes.
yaml() { printf "'%s'" "${1//\'/\'\'}"; }

manifest() {
  local argument arguments=("--config=$config" "--workdir=$workdir")
  ((hosts == 1)) || arguments+=(--coordinator_address=auto)
  arguments+=(${REST[@]+"${REST[@]}"})
  cat <<YAML
apiVersion: v1
kind: Service
metadata:
  name: $name
${namespace:+  namespace: $(yaml "$namespace")
}spec:
  clusterIP: None
  publishNotReadyAddresses: true  # They must meet before they are ready.
  selector:
    job-name: $name
---
apiVersion: batch/v1
kind: Job
metadata:
  name: $name
${namespace:+  namespace: $(yaml "$namespace")
}spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  # A host that is lost after the end need not come back.
  successPolicy:
    rules:
      - succeededIndexes: "0"
  # A lost host ends all the others, each with a failure of its own.
  backoffLimit: $((hosts * max_restarts))
  # The old pod must be gone before a new one takes its place in the slice.
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      # A preemption, whatever its exit status, is no failure.
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
      # Saved and stopped: start again.
      - action: Ignore
        onExitCodes:
          containerName: train
          operator: In
          values: [$TEMPORARY]
      # Something given is wrong: do not.
      - action: FailJob
        onExitCodes:
          containerName: train
          operator: In
          values: [$BAD_INPUT]
  template:
    metadata:
      labels:
        job-name: $name
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: 120
${service_account:+      serviceAccountName: $(yaml "$service_account")
}      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
        cloud.google.com/gke-tpu-topology: $(yaml "$topology")
      securityContext:
        runAsUser: 0  # The TPU's device files are root's.
      containers:
        - name: train
          image: $(yaml "$image")
          args:
YAML
  for argument in "${arguments[@]}"; do
    printf '            - %s\n' "$(yaml "$argument")"
  done
  cat <<YAML
          ports:
            - containerPort: 8471  # The TPU runtime's.
            - containerPort: 8482  # The coordinator's of JAX.
          resources:
            requests:
              google.com/tpu: $chips_per_host
            limits:
              google.com/tpu: $chips_per_host
YAML
}

case $COMMAND in
  manifest | submit | resume)
    need image workdir
    if [[ $workdir != gs://* && -z $shared_disk ]]; then
      refuse "--workdir=$workdir: a pod's own disk does not outlive it; give" \
        "gs://BUCKET/PATH, or --shared_disk if all pods mount this path"
    fi
    if [[ $COMMAND == resume ]]; then
      # In the foreground the Job is gone only after its pods.
      kubectl_run delete job "$name" --ignore-not-found --cascade=foreground \
        --wait
    fi
    if [[ $COMMAND == manifest ]]; then
      manifest
    elif [[ -n $dry_run ]]; then
      show kubectl apply -f -
      manifest
    else
      manifest | run kubectl apply -f -
    fi
    ;;
  status)
    kubectl_run get job,pods "--selector=job-name=$name" --output=wide
    ;;
  logs)
    # A worker that was started again has several pods.
    selector=job-name=$name,batch.kubernetes.io/job-completion-index=$worker
    pods=$(kubectl_run get pods "--selector=$selector" \
      --sort-by=.metadata.creationTimestamp --output=name)
    options=(--tail=100 ${follow:+--follow})
    if [[ -n $dry_run ]]; then
      echo "pod=\$($pods | tail -n 1)"
      echo "$(kubectl_run logs "${options[@]}") \"\$pod\""
    elif [[ -z $pods ]]; then
      echo "$SCRIPT: worker $worker of $name has no pod; see $SCRIPT status" >&2
      exit 1
    else
      kubectl_run logs "${options[@]}" "$(tail -n 1 <<<"$pods")"
    fi
    ;;
  delete)
    kubectl_run delete job,service "$name" --ignore-not-found
    ;;
  '') refuse "no command is given; see $SCRIPT --help" ;;
  *) refuse "unknown command '$COMMAND'; see $SCRIPT --help" ;;
esac

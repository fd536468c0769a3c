#!/usr/bin/env bash
# Trains on a TPU slice in Google Kubernetes Engine with plain kubectl: an
# Indexed Job runs one pod on each host of the slice, and the pods find each
# other through a headless Service.
#
# usage: launch/gke.sh COMMAND FLAG... [-- EMPDG_TRAIN_FLAG...]
#
# commands:
#   manifest   print the YAML
#   submit     apply it; Kubernetes restarts training after a preemption or a
#              lost host
#   resume     delete the Job, wait until its pods are gone, and submit it
#              again: after it has ended, or to change its image or flags
#   status     show the Job and its pods
#   logs       show the output of a worker's newest pod: --worker=N, --follow
#   delete     delete the Job and the Service; the pods save and exit
#
# flags:
#   --name=empdg           name of the Job
#   --namespace=           Kubernetes namespace (default: kubectl's current one)
#   --image=               image built from launch/Dockerfile (required by
#                          manifest, submit and resume)
#   --accelerator=tpu-v5-lite-podslice
#   --topology=4x4         topology of the node pool; hosts = chips /
#                          chips_per_host
#   --chips_per_host=4
#   --workdir=             gs://BUCKET/PATH (required by manifest, submit and
#                          resume)
#   --shared_disk          --workdir is a path on a disk that all pods share;
#                          edit the manifest to mount it
#   --config=configs/pod.py:CHIPS
#   --service_account=     Kubernetes service account that can write to the
#                          bucket
#   --max_restarts=10      restarts after lost hosts; preemptions do not count
#   --worker=0 --follow    for logs
#   --dry_run              only print the commands
#   --help                 print this text
#
# Requires kubectl with access to a cluster running Kubernetes 1.31 or newer,
# and a TPU node pool with the given accelerator and topology.
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
  refuse "--topology=$topology: expected a topology such as 4x4 or 2x2x4"
fi
need_number 1 chips_per_host
need_number 0 max_restarts worker
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]]; then
  refuse "--name=$name: expected lowercase letters, digits and hyphens"
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

# Prints a YAML string in single quotes.
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
  publishNotReadyAddresses: true  # Hosts must connect before they are ready.
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
  # A host lost after training has finished need not come back.
  successPolicy:
    rules:
      - succeededIndexes: "0"
  # A lost host makes all others fail too, and each failure counts.
  backoffLimit: $((hosts * max_restarts))
  # A new pod needs the place of the old one in the slice, so wait for its end.
  podReplacementPolicy: Failed
  podFailurePolicy:
    rules:
      # A preemption is not a failure, whatever the exit status.
      - action: Ignore
        onPodConditions:
          - type: DisruptionTarget
      # Saved and stopped: restart.
      - action: Ignore
        onExitCodes:
          containerName: train
          operator: In
          values: [$TEMPORARY]
      # Bad input: do not restart.
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
        runAsUser: 0  # Root owns the TPU's device files.
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
            - containerPort: 8471  # TPU runtime.
            - containerPort: 8482  # JAX coordinator.
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
      refuse "--workdir=$workdir: a pod's own disk is deleted with it; give" \
        "gs://BUCKET/PATH, or --shared_disk if all pods mount this path"
    fi
    if [[ $COMMAND == resume ]]; then
      # With foreground deletion, the Job is deleted only after its pods.
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
    # A restarted worker has several pods.
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
  '') refuse "no command given; see $SCRIPT --help" ;;
  *) refuse "unknown command '$COMMAND'; see $SCRIPT --help" ;;
esac

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
#   --config=configs/pod.py:DEVICES    (a chip of tpu7x is two devices)
#   --service_account=     Kubernetes service account that can write to the
#                          bucket
#   --max_restarts=10      restarts after lost hosts; preemptions do not count
#   --spot                 run on a pool of Spot VMs, which can be preempted at
#                          any time
#   --grace=120            seconds from SIGTERM to SIGKILL, for saving (default
#                          with --spot: 15, the most that such a node gives
#                          unless its pool says otherwise; see README.md)
#   --queue=               Kueue's LocalQueue, to wait there for its quota
#   --priority_class=      PriorityClass of the pods
#   --max_hours=0          end the Job this many hours after it has started,
#                          finished or not; 0 for no limit
#   --ttl_hours=168        delete the Job, and its logs, this long after its end
#   --cpu=8 --memory=16Gi  requests of each pod
#   --worker=0 --follow    for logs
#   --dry_run              only print the commands
#   --help                 print this text
#
# Requires kubectl with access to a cluster running Kubernetes 1.31 or newer,
# and a TPU node pool with the given accelerator and topology. All pods of the
# Job run in one such pool, which is one slice.
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
max_restarts=10 worker=0 follow='' dry_run='' spot='' grace='' queue=''
priority_class='' max_hours=0 ttl_hours=168 cpu=8 memory=16Gi
parse_flags 'name namespace image accelerator topology chips_per_host workdir
 config service_account max_restarts worker grace queue priority_class max_hours
 ttl_hours cpu memory' 'shared_disk spot follow dry_run' "$@"
if ! [[ $topology =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]]; then
  refuse "--topology=$topology: expected a topology such as 4x4 or 2x2x4"
fi
need_number 1 chips_per_host
: "${grace:=${spot:+15}}" "${grace:=120}"
need_number 0 max_restarts worker max_hours ttl_hours
need_number 1 grace
[[ $cpu =~ ^[1-9][0-9]*m?$ ]] ||
  refuse "--cpu=$cpu: expected cores, such as 8 or 500m"
[[ $memory =~ ^[1-9][0-9]*[KMGT]i$ ]] ||
  refuse "--memory=$memory: expected a size such as 16Gi"
if ! [[ $name =~ ^[a-z]([-a-z0-9]{0,50}[a-z0-9])?$ ]]; then
  refuse "--name=$name: expected lowercase letters, digits and hyphens"
fi

deadline=
((max_hours == 0)) || deadline=$((max_hours * 3600))
chips=$((${topology//x/ * }))
((chips % chips_per_host == 0)) ||
  refuse "--topology=$topology has $chips chips, not a multiple of" \
    "--chips_per_host=$chips_per_host"
hosts=$((chips / chips_per_host))
devices=$chips
[[ $accelerator != tpu7x ]] || devices=$((2 * chips))  # Two a chip, to JAX.
: "${config:=configs/pod.py:$devices}"

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
}${queue:+  labels:
    kueue.x-k8s.io/queue-name: $(yaml "$queue")
}spec:
  completionMode: Indexed
  completions: $hosts
  parallelism: $hosts
  # A host lost after training has finished need not come back.
  successPolicy:
    rules:
      - succeededIndexes: "0"
  ttlSecondsAfterFinished: $((ttl_hours * 3600))
${deadline:+  activeDeadlineSeconds: $deadline
}  # A lost host makes all others fail too, and each failure counts.
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
        empdg-slice: $name
    spec:
      subdomain: $name
      restartPolicy: Never
      terminationGracePeriodSeconds: $grace
${priority_class:+      priorityClassName: $(yaml "$priority_class")
}${service_account:+      serviceAccountName: $(yaml "$service_account")
}      nodeSelector:
        cloud.google.com/gke-tpu-accelerator: $(yaml "$accelerator")
        cloud.google.com/gke-tpu-topology: $(yaml "$topology")
${spot:+        cloud.google.com/gke-spot: 'true'
      tolerations:
        - key: cloud.google.com/gke-spot
          operator: Equal
          value: 'true'
          effect: NoSchedule
}      affinity:
        # A node pool is a slice. Pods in two pools would never meet, and those
        # of two Jobs in one pool would each wait for the other's place.
        podAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: cloud.google.com/gke-nodepool
              labelSelector:
                matchLabels:
                  empdg-slice: $name
        podAntiAffinity:
          requiredDuringSchedulingIgnoredDuringExecution:
            - topologyKey: cloud.google.com/gke-nodepool
              namespaceSelector: {}
              labelSelector:
                matchExpressions:
                  - key: empdg-slice
                    operator: Exists
                  - key: empdg-slice
                    operator: NotIn
                    values: [$name]
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
              cpu: $(yaml "$cpu")
              memory: $memory
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

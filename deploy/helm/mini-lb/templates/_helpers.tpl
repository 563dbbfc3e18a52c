{{- define "mini-lb.name" -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}

{{- define "mini-lb.selector" -}}
app.kubernetes.io/name: mini-lb
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "mini-lb.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "mini-lb.name" .) -}}
{{- end -}}

{{- define "mini-lb.watched" -}}
{{- .Values.discovery.kubernetes.namespace | default .Release.Namespace -}}
{{- end -}}

{{- define "mini-lb.config" -}}
{{- $dns := .Values.discovery.dns -}}
{{- $pods := .Values.discovery.kubernetes -}}
host = "0.0.0.0"
port = 30000
{{- if $dns.enabled }}
{{- $domain := printf "%s.svc.%s" .Release.Namespace $dns.clusterDomain }}
# Headless services: every address is a server, and the router follows changes.
prefill_dns = [["{{ $dns.prefill.service }}.{{ $domain }}:{{ $dns.prefill.port | int }}", {{ $dns.prefill.bootstrapPort | int }}]]
decode_dns = ["{{ $dns.decode.service }}.{{ $domain }}:{{ $dns.decode.port | int }}"]
{{- end }}
{{- if $pods.enabled }}
# Ready pods are servers. The bootstrap port is in their annotation sglang.ai/bootstrap-port.
service_discovery = true
service_discovery_namespace = "{{ include "mini-lb.watched" . }}"
service_discovery_port = {{ $pods.port | int }}
prefill_selector = {{ toJson $pods.prefillSelector }}
decode_selector = {{ toJson $pods.decodeSelector }}
{{- end }}
policy = "{{ .Values.policy }}"
# Prometheus runs in another pod.
prometheus_host = "0.0.0.0"
prometheus_port = 29000
# Drain delay: in this time the service removes the pod, and clients move to other pods.
shutdown_lame_duck_secs = {{ .Values.drain.lameDuckSeconds | int }}
shutdown_grace_period_secs = {{ .Values.drain.graceSeconds | int }}
log_format = "json"
{{- with .Values.config }}
{{ . | trim }}
{{- end }}
{{- end -}}

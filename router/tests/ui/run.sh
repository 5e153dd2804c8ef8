#!/usr/bin/env bash
# Shows the page at /ui to a real browser, over a router with workers that answer, and keeps what it looks like in
# ${ARTIFACTS:-target/artifacts}/ui*.png. Needs chromium and python3.
set -euo pipefail
cd "$(dirname "$0")/../../.."
artifacts=${ARTIFACTS:-target/artifacts}
mkdir -p "$artifacts"
work=$(mktemp -d)
fleet=
end() {
  # Closing its input ends the fleet.
  exec 8>&- || true
  if [[ -n $fleet ]]; then wait "$fleet" || true; fi
  rm -rf "$work"
}
trap end EXIT
# CI has built the whole workspace before, which shares features among its members.
scope=(-p kvrouter)
[[ -z "${CI:-}" ]] || scope=(--workspace)
cargo test -q "${scope[@]}" --test ops --no-run
for size in 2 16; do
  mkfifo "$work/input$size"
  FLEET=$size cargo test -q "${scope[@]}" --test ops -- --ignored --exact ui_fleet::serve --nocapture \
    <"$work/input$size" >"$work/log$size" 2>&1 &
  fleet=$!
  exec 8>"$work/input$size"
  for ((tries = 0; ; tries++)); do
    url=$(sed -n 's/^URL //p' "$work/log$size")
    [[ -z $url ]] || break
    if ((tries > 600)) || ! kill -0 "$fleet" 2>/dev/null; then
      echo "the fleet did not start:"; cat "$work/log$size"; exit 1
    fi
    sleep 0.1
  done
  # The browser's script says when the router may end, and looks at the page once more.
  python3 router/tests/ui/look.py "$url" "$size" "$artifacts" "$work" 8>&- &
  look=$!
  while kill -0 "$look" 2>/dev/null && [[ ! -e $work/stop$size ]]; do sleep 0.1; done
  exec 8>&-
  wait "$fleet"
  fleet=
  wait "$look"
done
echo "screenshots: $artifacts/ui.png ui-dark.png ui-16.png"

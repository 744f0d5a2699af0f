"""How the page looks: on paper, on a phone, on a wide screen, in light and in dark."""

STYLE = """\
:root {
  --text: #1b1f23; --quiet: #57606a; --ground: #ffffff; --raised: #f6f8fa; --rule: #d8dee4;
  --accent: #0072b2; --bar: #0072b2; --minus: #d55e00; --tint: #eaf4fa;
  --shade: #1b1f2330;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --text: #e3e6e8; --quiet: #a1a9b1; --ground: #14171a; --raised: #1d2125; --rule: #363c42;
    --accent: #6cbcec; --bar: #3f9bd3; --minus: #e8833a; --tint: #14293a;
    --shade: #000000a0;
  }
}
*, ::before, ::after { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62.5rem;
  background: var(--ground); color: var(--text);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
a { color: var(--accent); text-decoration-thickness: 0.06em; text-underline-offset: 0.18em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible, pre:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
h1, h2, h3 { line-height: 1.25; font-weight: 650; text-wrap: balance; }
h1 { margin: 0 0 0.6rem; font-size: 2rem; letter-spacing: -0.015em; }
h2 { margin: 0 0 1rem; font-size: 1.3rem; letter-spacing: -0.005em; }
h3 { margin: 0 0 0.7rem; font-size: 1.05rem; }
p { margin: 0 0 1rem; max-width: 42rem; text-wrap: pretty; }
ul { margin: 0 0 1rem; padding-left: 1.2rem; max-width: 42rem; text-wrap: pretty; }
li { margin: 0.2rem 0; }
.kicker {
  margin: 0 0 0.4rem; color: var(--accent); font-size: 0.8rem; font-weight: 600;
  letter-spacing: 0.04em;
}
.lead { margin-bottom: 1.75rem; font-size: 1.125rem; line-height: 1.5; }
.finding { font-size: 1.05rem; line-height: 1.55; }
.notes, .numbers, .missing, footer { color: var(--quiet); font-size: 0.9rem; }
code, pre {
  font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.875em;
}
code, .name { unicode-bidi: isolate; }

.tiles {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(11.5rem, 100%), 1fr));
  gap: 1.5rem 1.75rem; margin: 0 0 2rem;
}
.tile { padding-top: 0.7rem; border-top: 2px solid var(--rule); }
.tile.main { border-color: var(--accent); }
.tile dt { color: var(--quiet); font-size: 0.85rem; line-height: 1.35; }
.tile dd { margin: 0.15rem 0 0; color: var(--quiet); font-size: 0.85rem; line-height: 1.4; }
.tile dd.value { color: var(--text); font-size: 1.3rem; font-weight: 600; line-height: 1.3; }
.tile dd.long { font-size: 1rem; overflow-wrap: anywhere; }
.tile.main dd.value { color: var(--accent); font-size: 1.9rem; line-height: 1.15; }

nav { margin: 0 0 3rem; padding: 0.85rem 0; border: solid var(--rule); border-width: 1px 0; }
nav ol {
  display: flex; flex-wrap: wrap; gap: 0.35rem 1.5rem; margin: 0; padding: 0; list-style: none;
}
nav li { margin: 0; }
nav a { text-decoration: none; }
nav a:hover { text-decoration: underline; }
main > section { margin: 0 0 3.5rem; scroll-margin-top: 1rem; }
main > section > section { margin: 2rem 0 0; }
section > :last-child { margin-bottom: 0; }

.scroll {  /* shadows at the edges tell that there is more */
  margin: 0 0 1.25rem; overflow-x: auto;
  background:
    linear-gradient(to right, var(--ground) 35%, transparent) left / 3rem 100% local,
    linear-gradient(to left, var(--ground) 35%, transparent) right / 3rem 100% local,
    linear-gradient(to right, var(--shade), transparent) left / 0.9rem 100%,
    linear-gradient(to left, var(--shade), transparent) right / 0.9rem 100%;
  background-repeat: no-repeat;
}
table { width: 100%; border-collapse: collapse; font-size: 0.9rem; line-height: 1.4; }
th, td {
  padding: 0.42rem 0 0.42rem 1.5rem; border-bottom: 1px solid var(--rule);
  text-align: right; vertical-align: baseline; font-weight: 400; white-space: nowrap;
}
th:first-child, td:first-child { padding-left: 0; }
th.text, td.text, th.scheme, td.scheme, th.bar, td.bar, th.hash, td.hash { text-align: left; }
thead th {
  vertical-align: bottom; border-bottom: 1px solid var(--quiet); color: var(--quiet);
  font-size: 0.82rem; line-height: 1.3; white-space: normal; overflow-wrap: normal;
}
tbody th { min-width: 9rem; white-space: normal; }
td.scheme { min-width: 11rem; white-space: normal; }
td.hash { min-width: 12rem; font-size: 0.85em; white-space: normal; overflow-wrap: anywhere; }
tr.out > * { background: var(--tint); }
tr.out > :first-child { box-shadow: inset 3px 0 var(--accent); padding-left: 0.75rem; }
b { font-weight: 650; }
span.bar { display: flex; align-items: center; gap: 0.75rem; min-width: 10rem; }
td.wide span.bar { min-width: 13rem; }
span.bar svg { flex: 1 1 4rem; height: 0.6rem; min-width: 4rem; }
span.bar span { flex: none; min-width: 6.2em; }
td.wide span.bar span { min-width: 8em; }
rect.plus { fill: var(--bar); }
rect.minus { fill: var(--minus); }
line { stroke: var(--quiet); stroke-width: 1; vector-effect: non-scaling-stroke; }
.strip { display: block; width: 100%; max-width: 42rem; height: 5rem; margin: 0 0 1.5rem; }

.facts { margin: 0 0 1.5rem; }
.fact { display: grid; grid-template-columns: 13rem 1fr; gap: 0 1.5rem; padding: 0.3rem 0; }
.fact dt { color: var(--quiet); }
.fact dd { margin: 0; }
.fact details, .fact p { margin: 0; }

details { margin: 0 0 1.25rem; }
summary { color: var(--accent); cursor: pointer; }
details[open] > summary { margin-bottom: 0.75rem; }
pre {
  margin: 0 0 1.25rem; padding: 0.85rem 1rem; overflow-x: auto; border-radius: 4px;
  background: var(--raised); line-height: 1.5; white-space: pre-wrap;
}
figure { margin: 0 0 1.5rem; }
figure img {
  display: block; max-width: 100%; height: auto; margin: 0 auto; padding: 0.5rem;
  background: #ffffff; border-radius: 4px;
}
figcaption { margin-top: 0.5rem; color: var(--quiet); font-size: 0.9rem; }
footer { padding-top: 1rem; border-top: 1px solid var(--rule); }

@media (max-width: 40rem) {
  body { padding: 1.5rem 1rem 3rem; }
  h1 { font-size: 1.6rem; }
  .tiles { grid-template-columns: repeat(auto-fit, minmax(min(8rem, 100%), 1fr)); gap: 1.1rem; }
  .tile dd.value { font-size: 1.1rem; }
  .tile dd.long { font-size: 0.95rem; }
  .tile.main { grid-column: 1 / -1; }
  nav { margin-bottom: 2.25rem; }
  main > section { margin-bottom: 2.5rem; }
  .fact { grid-template-columns: 1fr; }
  th, td { padding-left: 1rem; }
  tbody th { min-width: 7.5rem; }
  span.bar { min-width: 8rem; gap: 0.5rem; }
  td.wide span.bar { min-width: 11rem; }
  span.bar svg { flex-basis: 2.5rem; min-width: 2.5rem; }
}
@media print {
  @page { size: A4; margin: 16mm; }
  body { max-width: none; padding: 0; font-size: 10pt; line-height: 1.45; }
  nav { display: none; }
  h1 { font-size: 20pt; }
  h2, h3, summary, thead, p:has(+ .scroll), p:has(+ pre) { break-after: avoid; }
  main > section { margin-bottom: 1.75rem; }
  tr, figure, .tile, .fact { break-inside: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; background: none; }
  .whole { break-inside: avoid; }
  table { font-size: 8.5pt; }
  th, td { padding: 0.2rem 0 0.2rem 0.75rem; white-space: normal; }
  summary { list-style: none; color: inherit; }
  tbody th { min-width: 0; }
  td.hash, td.scheme { min-width: 0; }
  span.bar, td.wide span.bar { min-width: 0; }
  span.bar svg { flex-basis: 2.5rem; min-width: 2.5rem; }
  figure img { max-height: 230mm; padding: 0; }
  pre { padding: 0.5rem 0; border: solid var(--rule); border-width: 1px 0; background: none; }
  tr.out > * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details::details-content { display: block; content-visibility: visible; block-size: auto; }
  a { color: inherit; }
}
"""

"""The style sheet of the gallery page: light and dark, from phone to desk, and on paper."""

from __future__ import annotations

STYLE = """
:root {
  --page: #f6f7f9; --card: #ffffff; --ink: #171a1f; --soft: #59626e; --line: #e2e5ea; --accent: #3b57d6;
  --right: #18794e; --right-soft: #e3f4ea; --wrong: #b1480b; --wrong-soft: #fdeee2; --track: #e8eaef; --tile: #ffffff;
  --shadow: 0 1px 2px rgb(20 25 35 / .05), 0 4px 14px rgb(20 25 35 / .05);
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #0f1115; --card: #181b21; --ink: #eceef1; --soft: #a3acb8; --line: #2a2f38; --accent: #93a7ff;
    --right: #4fce8f; --right-soft: #14301f; --wrong: #f2a365; --wrong-soft: #3a2413; --track: #2b303a; --tile: #ffffff;
    --shadow: none;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-padding-top: 4rem; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "Noto Sans", "DejaVu Sans", sans-serif;
}
.wrap { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
h1, h2, h3, h4, p, ul, ol, dl, dd, figure { margin: 0; padding: 0; }
ul, ol { list-style: none; }
bdi, h1 { overflow-wrap: anywhere; }
a { color: var(--accent); }
:focus-visible { outline: 3px solid var(--accent); outline-offset: 3px; border-radius: 4px; }
.hidden, .sprite {
  position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap;
}
.skip {
  position: absolute; left: -999px; top: 8px; z-index: 9; background: var(--card); padding: 8px 14px;
  border-radius: 8px;
}
.skip:focus { left: 12px; }

.eyebrow { display: block; font-size: .75rem; font-weight: 600; letter-spacing: .02em; color: var(--soft); }
.note { font-size: .875rem; color: var(--soft); }
.how { max-width: 76ch; color: var(--soft); margin: 6px 0 24px; }
.how b { color: var(--ink); font-weight: 600; }
.score { font-variant-numeric: tabular-nums; font-size: .8125rem; color: var(--soft); }

.top { padding: 44px 0 28px; }
.top .eyebrow { color: var(--accent); font-size: .875rem; }
h1 { font-size: clamp(1.75rem, 5vw, 2.75rem); line-height: 1.15; letter-spacing: -.025em; font-weight: 700; }
.facts { display: flex; flex-wrap: wrap; gap: 10px 32px; margin: 18px 0 24px; }
.facts dt { font-size: .75rem; color: var(--soft); }
.facts dd { font-weight: 600; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(210px, 1fr)); gap: 14px; }
.card, .panel, .row {
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; box-shadow: var(--shadow); min-width: 0;
}
.card { padding: 16px 18px; }
.card .label { font-size: .875rem; color: var(--soft); }
.card .value {
  font-size: 1.75rem; line-height: 1.3; font-weight: 700; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums;
}
details { margin-top: 16px; }
summary {
  cursor: pointer; color: var(--accent); font-weight: 600; font-size: .9375rem; width: fit-content; padding: 4px 0;
}
.scroll { overflow-x: auto; margin: 8px 0; }
table { border-collapse: collapse; font-size: .9375rem; font-variant-numeric: tabular-nums; }
th, td { padding: 7px 18px 7px 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th[scope=row] { text-align: left; font-weight: 600; }
thead th { color: var(--soft); font-weight: 500; }

nav { position: sticky; top: 0; z-index: 5; background: var(--page); border-bottom: 1px solid var(--line); }
nav ul { display: flex; flex-wrap: wrap; gap: 0 26px; }
nav a { display: block; padding: 12px 0; text-decoration: none; font-weight: 600; font-size: .9375rem; }
nav a:hover { text-decoration: underline; text-underline-offset: 4px; }

section { padding: 44px 0 8px; }
h2 { font-size: 1.625rem; letter-spacing: -.02em; line-height: 1.25; }
h3.sub { font-size: 1.1875rem; margin: 32px 0 4px; }
h3.sub + .note { margin-bottom: 16px; max-width: 76ch; }

.frame {
  position: relative; background: var(--tile); border: 1px solid var(--line); border-radius: 12px; aspect-ratio: 1;
  padding: 8%; display: flex;
}
.pic { width: 100%; height: 100%; display: block; }
.frame.right, .tile.right .frame { border-color: var(--right); box-shadow: 0 0 0 1px var(--right); }
.frame.wrong { border-color: var(--wrong); box-shadow: 0 0 0 1px var(--wrong); }
.frame .mark {
  position: absolute; right: -7px; top: -7px; width: 22px; height: 22px; border-radius: 50%; background: var(--right);
  color: var(--card); font-size: .8125rem; font-weight: 700; display: grid; place-items: center;
}

.row { display: grid; grid-template-columns: 240px minmax(0, 1fr); gap: 24px; padding: 20px; margin-bottom: 14px; }
.asked h3 { font-size: 1.0625rem; line-height: 1.35; margin: 2px 0 8px; }
.notes { font-size: .875rem; color: var(--soft); }
.notes b, .note b { color: var(--ink); font-variant-numeric: tabular-nums; }
.notes li + li { margin-top: 4px; }
.tiles { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 14px; }
.tile .score { text-align: center; margin-top: 6px; }
.tile.right .score { color: var(--right); font-weight: 700; }
.caption {
  font-size: .75rem; line-height: 1.35; color: var(--soft); text-align: center; overflow: hidden;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; line-clamp: 3;
}

.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(330px, 100%), 1fr)); gap: 14px; }
.grid.wide { grid-template-columns: repeat(auto-fill, minmax(min(500px, 100%), 1fr)); }
.panel { padding: 18px; display: flex; flex-direction: column; gap: 12px; }
.panel h3, .panel h4 { font-size: 1rem; line-height: 1.35; }
.head { display: grid; grid-template-columns: 96px minmax(0, 1fr); gap: 16px; align-items: center; }
.lines { display: grid; gap: 9px; }
.line {
  display: grid; grid-template-columns: minmax(0, 1fr) auto; gap: 0 12px; align-items: end; font-size: .9375rem;
  line-height: 1.35;
}
.line .bar { grid-column: 1 / -1; }
.line.right .said, .line.right .score { color: var(--right); font-weight: 600; }
.said .mark { margin-left: 6px; }
.line.wrong .score { color: var(--wrong); font-weight: 600; }
.bar { width: 100%; height: 4px; display: block; margin-top: 4px; border-radius: 2px; }
.track { fill: var(--track); }
.fill { fill: var(--accent); }
.right > .bar .fill, .frame.right + figcaption .fill { fill: var(--right); }
.wrong > .bar .fill, .frame.wrong + figcaption .fill { fill: var(--wrong); }
.versus { display: grid; grid-template-columns: 1fr 1fr; gap: 16px; }
.versus .frame { max-width: 160px; margin: 0 auto; }
figcaption { font-size: .8125rem; color: var(--soft); text-align: center; margin-top: 6px; }
.badges { display: flex; flex-wrap: wrap; gap: 6px; margin-top: auto; }
.badge {
  font-size: .75rem; line-height: 1.6; padding: 1px 9px; border-radius: 99px; background: var(--track); color: var(--ink);
  font-variant-numeric: tabular-nums; white-space: nowrap;
}
sub { line-height: 0; }
.badge.warn { background: var(--wrong-soft); color: var(--wrong); font-weight: 600; }

.usage {
  display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 400px); gap: 24px; align-items: center;
  margin: 8px 0 18px;
}
.usage .notes { font-size: 1rem; }
.histogram svg { width: 100%; height: auto; display: block; }
.histogram text { font-size: 11px; fill: var(--soft); text-anchor: middle; }
.histogram line { stroke: var(--line); stroke-width: 1; }
.title { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
.small { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 10px; }
.small .score { text-align: center; font-size: .75rem; margin-top: 3px; }
footer { padding-top: 36px; padding-bottom: 44px; font-size: .875rem; color: var(--soft); overflow-wrap: anywhere; }
footer p + p { margin-top: 6px; }

@media (max-width: 860px) {
  .row { grid-template-columns: minmax(0, 1fr); gap: 16px; }
  .usage { grid-template-columns: minmax(0, 1fr); }
}
@media (max-width: 560px) {
  .wrap { padding: 0 16px; }
  .top { padding-top: 28px; }
  .cards { grid-template-columns: 1fr 1fr; gap: 10px; }
  .card { padding: 12px 14px; }
  .card .value { font-size: 1.375rem; }
  nav ul { gap: 0 18px; }
  nav a { padding: 8px 0; font-size: .875rem; }
  html { scroll-padding-top: 5rem; }
  .tiles, .small { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .row, .panel { padding: 16px; }
}
@media print {
  nav, .skip { display: none; }
  .row, .panel { break-inside: avoid; box-shadow: none; }
}
"""

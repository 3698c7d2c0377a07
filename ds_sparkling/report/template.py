"""The frame of the page; what is filled in stands as ``$name``."""

from __future__ import annotations

from string import Template

PAGE = Template("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --text: #1c1c1e; --dim: #63636b; --ground: #f6f6f7; --card: #fff; --line: #dcdce0;
        --good: #00694c; --watch: #a33c00; }
@media (prefers-color-scheme: dark) {
  :root { --text: #ececee; --dim: #a2a2ab; --ground: #17171a; --card: #212125; --line: #3a3a40;
          --good: #5bd0a8; --watch: #ff9a57; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 78rem; padding: 1.5rem; background: var(--ground); color: var(--text);
       font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.3; margin: 0 0 1rem; overflow-wrap: anywhere; }
details { margin: 1.2rem 0 0; }
summary { font-size: 1.1rem; font-weight: 600; cursor: pointer; padding: .3rem 0; }
h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
ul.verdict { list-style: none; margin: 0; padding: .3rem 1rem; background: var(--card);
             border: 1px solid var(--line); border-radius: 8px; }
ul.verdict li { padding: .35rem 0 .35rem 1.6rem; text-indent: -1.6rem; overflow-wrap: anywhere; }
.mark { display: inline-block; width: 1.3rem; text-indent: 0; font-weight: 700; color: var(--dim); }
.good .mark { color: var(--good); }
.watch, .watch .mark { color: var(--watch); }
.missing, .none { color: var(--dim); }
.table { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; }
thead th { color: var(--dim); font-weight: 600; font-size: .85rem; }
tbody tr:last-child > * { border-bottom: 0; }
.chip { display: inline-block; width: .8rem; height: .8rem; border-radius: 3px; margin-right: .5rem;
        border: 1px solid var(--line); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr));
           gap: 1rem; align-items: stretch; margin-top: .8rem; }
figure { margin: 0; height: 100%; padding: 1rem; background: var(--card);
         border: 1px solid var(--line); border-radius: 8px; }
img { display: block; width: 100%; height: auto; background: #fff; border-radius: 4px; }
figcaption { margin-top: .6rem; color: var(--dim); font-size: .88rem; }
pre { overflow-x: auto; padding: 1rem; background: var(--card); border: 1px solid var(--line); border-radius: 8px;
      font: 13px/1.45 ui-monospace, monospace; }
</style>
</head>
<body>
<p class="none">$title</p>
<h1>$headline</h1>
<ul class="verdict">
$findings
</ul>
<details open><summary>The runs and their losses</summary>
<div class="table"><table>
<thead><tr>$header</tr></thead>
<tbody>
$rows
</tbody>
</table></div>
<div class="figures">
$losses
</div>
</details>
<details><summary>All other findings ($number)</summary>
<ul class="verdict">
$rest
</ul>
</details>
<details><summary>Other curves</summary>
<div class="figures">
$figures
</div>
</details>
<details><summary>Growth plans</summary>
$plans
</details>
<details><summary>Read from</summary>
<ul>
$sources
</ul>
</details>
</body>
</html>
""")

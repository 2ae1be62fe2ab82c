"""Style sheet of the report: system fonts, light and dark, narrow and wide, print."""

STYLE = """
:root {
  --paper: #fbfaf8; --panel: #ffffff; --ink: #1d2126; --soft: #6b7280; --line: #e3e1dc;
  --private: #0f766e; --twin: #c2571a; --warn: #9f1239; --warn-paper: #fff1f2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --panel: #1b1f23; --ink: #e8e6e1; --soft: #9aa1aa; --line: #333940;
    --private: #4fd1c0; --twin: #f0995c; --warn: #fda4af; --warn-paper: #3a1720;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
main { max-width: 780px; margin: 0 auto; padding: 3rem 1.25rem 5rem; }
header { margin-bottom: 1.5rem; }
.kicker { margin: 0; color: var(--soft); font-size: .85rem; letter-spacing: .04em; }
h1 { margin: .2rem 0 0; font-size: 2.2rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .8rem; font-size: 1.25rem; letter-spacing: -.01em; }
p, ul { margin: 0 0 1rem; }
li { margin: .25rem 0; }
.lead { font-size: 1.15rem; }
.banner {
  padding: .9rem 1.1rem; border-left: 4px solid var(--warn); background: var(--warn-paper);
  border-radius: 4px;
}
.banner strong { color: var(--warn); }
.cards {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(160px, 1fr)); gap: .8rem;
  margin: 1.8rem 0;
}
.card {
  display: flex; flex-direction: column; padding: 1rem 1.1rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 10px;
}
.card span, .card small { color: var(--soft); font-size: .85rem; }
.card b { font-size: 1.9rem; line-height: 1.35; font-weight: 650; letter-spacing: -.02em; }
.card b { font-variant-numeric: tabular-nums; }
.card:nth-child(-n+2) b { color: var(--private); }
.card:nth-child(3) b { color: var(--twin); }
figure {
  margin: 0; padding: 1.1rem 1.1rem .9rem; background: var(--panel);
  border: 1px solid var(--line); border-radius: 10px;
}
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figcaption { margin-top: .7rem; color: var(--soft); font-size: .9rem; line-height: 1.5; }
.table { overflow-x: auto; }
table { width: 100%; border-collapse: collapse; font-size: .97rem; }
th, td { padding: .5rem .2rem; border-bottom: 1px solid var(--line); text-align: left; }
th { width: 45%; font-weight: 400; color: var(--soft); vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--soft); }
code { font: .88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
.hash { overflow-wrap: anywhere; color: var(--soft); }
@media print {
  body { font-size: 11pt; }
  section, figure { break-inside: avoid; }
}
"""

// node check.mjs PACKAGES [FOLDER]: holds every dashboard in FOLDER (../generated) against page.d.ts, with the types
// that PACKAGES has in node_modules. A setting that Grafana does not know, or a value that it does not take, is an
// error at its line.

import { readFileSync, readdirSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const packages = resolve(process.argv[2]);
const folder = resolve(process.argv[3] ?? join(here, "..", "generated"));
const ts = createRequire(join(packages, "package.json"))("typescript");

const options = {
  module: ts.ModuleKind.ESNext,
  moduleResolution: ts.ModuleResolutionKind.Bundler,
  noEmit: true,
  skipLibCheck: true,
  strict: true,
  target: ts.ScriptTarget.ES2022,
  types: [],
};

// Files that are nowhere but here, beside the packages that they import. A dashboard keeps its lines: what is around
// it stands on the first and the last one.
const files = new Map([[join(packages, "page.d.ts"), readFileSync(join(here, "page.d.ts"), "utf8")]]);
const dashboards = readdirSync(folder).filter((name) => name.endsWith(".json"));
for (const name of dashboards) {
  const text = readFileSync(join(folder, name), "utf8");
  files.set(
    join(packages, `${name}.ts`),
    `import type { Page } from "./page"; export const page: Page = ${text};`,
  );
}

const host = ts.createCompilerHost(options);
const { fileExists, getSourceFile, readFile } = host;
host.fileExists = (path) => files.has(path) || fileExists(path);
host.readFile = (path) => files.get(path) ?? readFile(path);
host.getSourceFile = (path, language, ...rest) =>
  files.has(path)
    ? ts.createSourceFile(path, files.get(path), language)
    : getSourceFile(path, language, ...rest);

const problems = ts.getPreEmitDiagnostics(ts.createProgram([...files.keys()], options, host));
for (const { file, start, messageText } of problems) {
  const line = file ? file.getLineAndCharacterOfPosition(start).line + 1 : 0;
  const place = file ? `${file.fileName.slice(packages.length + 1).replace(/\.json\.ts$/, ".json")}:${line}: ` : "";
  console.error(place + ts.flattenDiagnosticMessageText(messageText, "\n  "));
}
console.log(`${dashboards.length} dashboards, ${problems.length} problems`);
process.exit(problems.length || !dashboards.length ? 1 : 0);

// Validates custom resources against the schemas of their definitions: custom-resources.mjs FOLDER FILE...
// FOLDER has the packages @kubernetes-models/*.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const [folder, ...files] = process.argv.slice(2);
const load = (name) => import(pathToFileURL(`${folder}/node_modules/@kubernetes-models/${name}/index.js`));
const modules = {
  "monitoring.coreos.com/v1": await load("prometheus-operator/monitoring.coreos.com/v1"),
  "gateway.networking.k8s.io/v1": await load("gateway-api/gateway.networking.k8s.io/v1"),
};

function isValid(resource) {
  const copy = structuredClone(resource);
  try {
    new modules[resource.apiVersion][resource.kind](copy).validate();
    return true;
  } catch (error) {
    isValid.why = error.message;
    return false;
  }
}

// These schemas accept keys that they do not know. A known one has a type: no type is that of every value below.
function unknownKeys(resource, path = []) {
  const at = path.reduce((value, key) => value[key], resource);
  const keys = at !== null && typeof at === "object" ? Object.keys(at) : [];
  return keys.flatMap((key) => {
    const here = [...path, key];
    const isKnown = [{ not: {} }, ["x"], "\u0000", 0.5, true].some((wrong) => {
      const copy = structuredClone(resource);
      path.reduce((value, key) => value[key], copy)[key] = wrong;
      return !isValid(copy);
    });
    return isKnown ? unknownKeys(resource, here) : [here.join(".")];
  });
}

let checked = 0;
for (const file of files) {
  const resource = JSON.parse(readFileSync(file, "utf8"));
  if (!modules[resource.apiVersion]) continue;
  if (!isValid(resource)) throw new Error(`${file}: ${isValid.why}`);
  const unknown = unknownKeys(resource);
  if (unknown.length > 0) throw new Error(`${file}: unknown keys ${unknown.join(", ")}`);
  checked += 1;
}
// So that a broken check is seen.
const typo = { apiVersion: "monitoring.coreos.com/v1", kind: "ServiceMonitor", metadata: { name: "a" }, spec: { selector: {}, endpoints: [{ prot: "x" }] } };
if (unknownKeys(typo).join() !== "spec.endpoints.0.prot") throw new Error("a typo is not found");
console.log(`${checked} custom resources are valid`);
if (checked < 3) throw new Error("there are more");

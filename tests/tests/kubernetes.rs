//! The chart and the manifests of the CSI driver: that they are what Kubernetes reads, agree with each other, and
//! call the program as it can be called. The chart's templates use substitutions and conditions alone, which are
//! made here as Helm makes them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use quarry_tests::csi::{Driver, done, volume};
use quarry_tests::{Ran, Site, quarry_program};
use tempfile::tempdir;
use yaml_rust2::{Yaml, YamlLoader};

const DRIVER: &str = "csi.quarry.storage";

/// The chart's templates, in the order of the manifest.
const TEMPLATES: [&str; 5] = ["driver", "rbac", "controller", "node", "classes"];

const HEAD: &str = "# What the chart beside it makes with its values as they are, in the namespace `quarry`: `tests/tests/kubernetes.rs` holds it to that.\n";

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../gateway/packaging/kubernetes")
}

fn parsed(text: &str) -> Result<Vec<Yaml>> {
    Ok(YamlLoader::load_from_str(text)?)
}

/// `.Values.a.b`, `.Release.Namespace`.
fn value(path: &str, values: &Yaml) -> Result<String> {
    if path == ".Release.Namespace" {
        return Ok("quarry".to_owned());
    }
    let keys = path.strip_prefix(".Values.").context(path.to_owned())?;
    let found = keys.split('.').fold(values, |at, key| &at[key]);
    let text = found
        .as_str()
        .with_context(|| format!("there is no {path}"))?;
    Ok(text.to_owned())
}

fn rendered(template: &str, values: &Yaml) -> Result<String> {
    let mut text = String::new();
    let mut shown = vec![true];
    for line in template.lines() {
        if let Some(condition) = line.strip_prefix("{{- if ") {
            let path = condition.trim_end_matches(" }}");
            shown.push(!value(path, values)?.is_empty());
            continue;
        }
        if line == "{{- end }}" {
            shown.pop();
            continue;
        }
        if shown.contains(&false) {
            continue;
        }
        let mut rest = line;
        while let Some((before, path)) = rest.split_once("{{ ") {
            let (path, after) = path.split_once(" }}").context(line.to_owned())?;
            text.push_str(before);
            text.push_str(&value(path, values)?);
            rest = after;
        }
        ensure!(!rest.contains("{{"), "{line}: not a substitution");
        text.push_str(rest);
        text.push('\n');
    }
    ensure!(shown == [true], "a condition has no end");
    Ok(text)
}

/// What the chart makes, `change` made to its values.
fn chart(change: impl Fn(String) -> String) -> Result<String> {
    let chart = folder().join("quarry-csi");
    let values = change(fs::read_to_string(chart.join("values.yaml"))?);
    let values = parsed(&values)?;
    let values = values.first().context("values")?;
    let mut parts = Vec::new();
    for name in TEMPLATES {
        let path = chart.join("templates").join(format!("{name}.yaml"));
        parts.push(rendered(&fs::read_to_string(path)?, values)?);
    }
    let there = fs::read_dir(chart.join("templates"))?.count();
    ensure!(there == TEMPLATES.len(), "a template is not tested");
    parts.retain(|part| !part.trim().is_empty());
    Ok(parts.join("---\n"))
}

fn with_everything(values: String) -> String {
    values
        .replace("  url: \"\"", "  url: https://{host}:9443")
        .replace(
            "topology: \"\"",
            "topology: topology.csi.quarry.storage/zone=a",
        )
        .replace("  tenant: \"\"", "  tenant: acme")
}

fn list(yaml: &Yaml) -> &[Yaml] {
    yaml.as_vec().map_or(&[], Vec::as_slice)
}

fn text(yaml: &Yaml) -> &str {
    yaml.as_str().unwrap_or_default()
}

fn of_kind<'a>(all: &'a [Yaml], kind: &str) -> Vec<&'a Yaml> {
    all.iter()
        .filter(|one| text(&one["kind"]) == kind)
        .collect()
}

/// A pod's containers have what they mount, and its driver's flags are the program's.
fn check_pod(pod: &Yaml, flags: &str) -> Result<()> {
    let names = |what: &str| -> BTreeSet<&str> {
        list(&pod[what])
            .iter()
            .map(|one| text(&one["name"]))
            .collect()
    };
    let volumes = names("volumes");
    let mut mounted = BTreeSet::new();
    for container in list(&pod["containers"]) {
        let name = text(&container["name"]);
        ensure!(!text(&container["image"]).is_empty(), "{name} has no image");
        let mounts = list(&container["volumeMounts"]);
        let paths: Vec<&str> = mounts.iter().map(|m| text(&m["mountPath"])).collect();
        mounted.extend(mounts.iter().map(|m| text(&m["name"])));
        ensure!(paths.contains(&"/csi"), "{name} has no socket");
        let arguments: Vec<&str> = list(&container["args"]).iter().map(text).collect();
        if name == "driver" {
            ensure!(arguments.first() == Some(&"csi"), "{arguments:?}");
            for argument in &arguments[1..] {
                let (flag, value) = argument.split_once('=').context("--flag=value")?;
                ensure!(flags.contains(&format!("{flag} ")), "no flag {flag}");
                // A file that it is told to read is in something that it mounts.
                if value.starts_with('/') {
                    let is_there = paths
                        .iter()
                        .any(|path| value.starts_with(&format!("{path}/")));
                    ensure!(is_there, "{argument} is in no mount");
                }
            }
        } else {
            ensure!(
                arguments.contains(&"--csi-address=/csi/csi.sock"),
                "{name}: {arguments:?}"
            );
        }
        let port = container["ports"][0]["containerPort"].as_i64();
        if let Some(port) = port {
            let health = format!("--health-port={port}");
            let liveness = list(&pod["containers"])
                .iter()
                .find(|c| text(&c["name"]) == "liveness");
            let liveness = liveness.context("liveness")?;
            ensure!(
                list(&liveness["args"]).iter().any(|a| text(a) == health),
                "{health}"
            );
        }
    }
    ensure!(mounted == volumes, "{mounted:?} are mounted of {volumes:?}");
    Ok(())
}

#[test]
fn manifest_is_what_the_chart_makes() -> Result<()> {
    let made = HEAD.to_owned() + &chart(|values| values)?;
    let path = folder().join("quarry-csi.yaml");
    if std::env::var_os("QUARRY_WRITE_MANIFEST").is_some() {
        fs::write(&path, &made)?;
    }
    let there = fs::read_to_string(path).unwrap_or_default();
    ensure!(there == made, "run this test with QUARRY_WRITE_MANIFEST=1");
    Ok(())
}

#[test]
fn chart_calls_the_program_and_its_sidecars_as_they_can_be_called() -> Result<()> {
    let help = Ran::run(std::process::Command::new(quarry_program()).args(["csi", "--help"]))?;
    let flags = help.ok()?.stdout;
    let unchanged: fn(String) -> String = |values| values;
    for change in [unchanged, with_everything] {
        let all = parsed(&chart(change)?)?;
        let [driver] = of_kind(&all, "CSIDriver")[..] else {
            bail!("not one driver");
        };
        ensure!(text(&driver["metadata"]["name"]) == DRIVER);
        ensure!(
            driver["spec"]["attachRequired"].as_bool() == Some(true),
            "nobody is fenced"
        );
        let accounts: BTreeSet<&str> = of_kind(&all, "ServiceAccount")
            .iter()
            .map(|account| text(&account["metadata"]["name"]))
            .collect();
        for kind in ["Deployment", "DaemonSet"] {
            let [set] = of_kind(&all, kind)[..] else {
                bail!("not one {kind}");
            };
            let template = &set["spec"]["template"];
            let pod = &template["spec"];
            ensure!(
                accounts.contains(text(&pod["serviceAccountName"])),
                "{kind}: no account"
            );
            ensure!(set["spec"]["selector"]["matchLabels"] == template["metadata"]["labels"]);
            check_pod(pod, &flags)?;
        }
        for kind in ["ClusterRoleBinding", "RoleBinding"] {
            for binding in of_kind(&all, kind) {
                let role = text(&binding["roleRef"]["kind"]);
                let name = text(&binding["roleRef"]["name"]);
                let roles = of_kind(&all, role);
                ensure!(
                    roles.iter().any(|r| text(&r["metadata"]["name"]) == name),
                    "no {name}"
                );
                let subject = &binding["subjects"][0];
                ensure!(accounts.contains(text(&subject["name"])), "nobody is bound");
            }
        }
        let set = of_kind(&all, "DaemonSet")[0];
        let containers = list(&set["spec"]["template"]["spec"]["containers"]);
        let registered = containers.iter().flat_map(|c| list(&c["args"])).map(text);
        let registered = registered.filter(|a| a.starts_with("--kubelet-registration-path="));
        let registered: Vec<&str> = registered.collect();
        ensure!(registered.len() == 1 && registered[0].contains(&format!("/{DRIVER}/")));
    }
    let all = parsed(&chart(with_everything)?)?;
    ensure!(of_kind(&all, "StorageClass").len() == 1);
    ensure!(of_kind(&all, "VolumeSnapshotClass").len() == 1);
    Ok(())
}

/// With the driver itself, of the parameters as the provisioner passes them.
#[test]
fn classes_have_a_driver_and_parameters_that_it_takes() -> Result<()> {
    let dir = tempdir()?;
    let site = Site::with_folder(dir.path(), "one")?;
    let daemon = site.start()?;
    daemon.quarry(&["tenant", "create", "acme"])?;
    let driver = Driver::start(&site, &[])?;
    let mut all = parsed(&fs::read_to_string(folder().join("classes.yaml"))?)?;
    all.extend(parsed(&chart(with_everything)?)?);
    let classes = of_kind(&all, "StorageClass");
    ensure!(classes.len() == 3);
    for (number, class) in classes.into_iter().enumerate() {
        ensure!(text(&class["provisioner"]) == DRIVER);
        let mut request = volume("acme", &format!("of-class-{number}"), 64 << 20);
        let parameters = class["parameters"].as_hash().context("parameters")?;
        request.parameters.clear();
        for (name, value) in parameters {
            let value = value
                .as_str()
                .with_context(|| format!("{name:?} is no text"))?;
            request
                .parameters
                .insert(text(name).to_owned(), value.to_owned());
        }
        done("create", driver.create(request))?;
    }
    for class in of_kind(&all, "VolumeSnapshotClass") {
        ensure!(text(&class["driver"]) == DRIVER);
    }
    driver.stop()?;
    daemon.stop()
}

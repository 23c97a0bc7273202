//! docs/API.md, made from the API's document, which is made from the code.

use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Map, Value};

const HEAD: &str = "# API

HTTP and JSON, on the control socket for operators and by TLS for who bears a token ([who may what](ACCESS.md), [pages, repeats, errors](ACCESS.md#the-api-itself)):

```
curl --unix-socket /run/quarry/quarry.sock http://quarry/v1/volumes
curl --cacert ca.pem --header \"Authorization: Bearer $(cat acme.token)\" https://storage1:9443/v1/volumes
```

This page is made from `gateway/openapi.json`: `QUARRY_WRITE_PAGES=1 cargo test -p quarry-tests --test api_page`. A daemon serves that document at `/v1/openapi.json`.
";

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value[key].as_str().unwrap_or_default()
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flat_map(Map::iter)
}

/// A line of Markdown, also in a table.
fn line(text: &str) -> String {
    text.replace('\n', " ").replace('|', "\\|")
}

/// `integer`, `[VolumeInfo](#volumeinfo)`, `list of …`.
fn kind(schema: &Value) -> String {
    if let Some(name) = text(schema, "$ref").strip_prefix("#/components/schemas/") {
        return format!("[{name}](#{})", name.to_lowercase());
    }
    for key in ["anyOf", "oneOf", "allOf"] {
        if let Some(all) = schema[key].as_array() {
            let kinds: Vec<_> = all.iter().map(kind).filter(|k| k != "null").collect();
            return kinds.join(" or ");
        }
    }
    if let Some(values) = schema["enum"].as_array() {
        let values: Vec<_> = values.iter().map(|value| format!("`{value}`")).collect();
        return values.join(" or ");
    }
    if schema["const"].is_string() {
        return format!("`{}`", schema["const"]);
    }
    let of = |name: &str| match name {
        "array" => format!("list of {}", kind(&schema["items"])),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map to {}", kind(&schema["additionalProperties"]))
        }
        name => name.to_owned(),
    };
    match &schema["type"] {
        Value::String(name) => of(name),
        Value::Array(names) => {
            let names = names.iter().filter_map(Value::as_str);
            let names: Vec<_> = names.filter(|name| *name != "null").map(of).collect();
            names.join(" or ")
        }
        _ => "anything".to_owned(),
    }
}

fn body(content: &Value) -> Option<String> {
    let (_, content) = object(&content["content"]).next()?;
    Some(kind(&content["schema"]))
}

fn endpoint(page: &mut String, method: &str, path: &str, endpoint: &Value) -> Result<()> {
    write!(page, "\n### {} {path}\n\n", method.to_uppercase())?;
    let role = text(endpoint, "description").trim_start_matches("Needs the role ");
    writeln!(page, "{} For: {role}", text(endpoint, "summary"))?;
    let mut lines = Vec::new();
    for parameter in endpoint["parameters"].as_array().into_iter().flatten() {
        if text(parameter, "in") == "query" {
            let name = text(parameter, "name");
            let schema = &parameter["schema"];
            let about = [parameter, schema].map(|value| text(value, "description"));
            let about = about.iter().find(|about| !about.is_empty());
            let about = about.copied().unwrap_or_default();
            lines.push(format!("- `?{name}=` ({}): {}", kind(schema), line(about)));
        }
    }
    lines.extend(body(&endpoint["requestBody"]).map(|body| format!("- body: {body}")));
    for (status, answer) in object(&endpoint["responses"]) {
        if status != "default" {
            let body = body(answer).unwrap_or_else(|| "nothing".to_owned());
            lines.push(format!("- {status}: {body}"));
        }
    }
    write!(page, "\n{}\n", lines.join("\n"))?;
    Ok(())
}

fn type_of(page: &mut String, name: &str, schema: &Value) -> Result<()> {
    write!(page, "\n### {name}\n\n{}\n", text(schema, "description"))?;
    let variants = schema["oneOf"]
        .as_array()
        .or_else(|| schema["anyOf"].as_array());
    if let Some(variants) = variants {
        page.push('\n');
        for variant in variants {
            let about = line(text(variant, "description"));
            writeln!(
                page,
                "- {}{}{about}",
                kind(variant),
                if about.is_empty() { "" } else { ": " }
            )?;
        }
    } else if schema["enum"].is_array() {
        write!(page, "\n{}\n", kind(schema))?;
    }
    let mut fields = object(&schema["properties"]).peekable();
    if fields.peek().is_none() {
        return Ok(());
    }
    let required = schema["required"].as_array();
    page.push_str("\n| field | type | what |\n|---|---|---|\n");
    for (field, schema) in fields {
        let is_required = required.is_some_and(|all| all.iter().any(|name| name == field));
        let mark = if is_required { "" } else { "?" };
        let about = line(text(schema, "description"));
        writeln!(
            page,
            "| `{field}`{mark} | {} | {about} |",
            kind(schema).replace('|', "\\|")
        )?;
    }
    Ok(())
}

fn page(document: &Value) -> Result<String> {
    let mut page = HEAD.to_owned();
    let groups = [
        ("Volumes", "/v1/volumes"),
        ("Snapshots", "/v1/snapshots"),
        ("Trash", "/v1/trash"),
        ("Tenants", "/v1/tenants"),
        ("Tokens", "/v1/tokens"),
        ("The daemon", "/"),
    ];
    let group_of = |path: &str| {
        groups
            .iter()
            .position(|(_, prefix)| path.starts_with(prefix))
    };
    for (index, (title, _)) in groups.iter().enumerate() {
        write!(page, "\n## {title}\n")?;
        for (path, methods) in object(&document["paths"]) {
            if group_of(path) == Some(index) {
                for (method, about) in object(methods) {
                    endpoint(&mut page, method, path, about)?;
                }
            }
        }
    }
    page.push_str("\n## Types\n\nA field with a `?` may be absent.\n");
    for (name, schema) in object(&document["components"]["schemas"]) {
        type_of(&mut page, name, schema)?;
    }
    Ok(page)
}

/// With `QUARRY_WRITE_PAGES=1` it writes the page instead.
#[test]
fn page_of_the_api_is_what_its_document_makes() -> Result<()> {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR"));
    let top = tests.parent().context("the repository")?;
    let document = fs::read_to_string(top.join("gateway/openapi.json"))?;
    let page = page(&serde_json::from_str(&document)?)?;
    let path = top.join("docs/API.md");
    if env::var_os("QUARRY_WRITE_PAGES").is_some() {
        fs::write(&path, &page)?;
    }
    let there = fs::read_to_string(&path).unwrap_or_default();
    ensure!(there == page, "run this test with QUARRY_WRITE_PAGES=1");
    Ok(())
}

//! The API's document: OpenAPI 3.1, made of the table of endpoints and of the types that go over the wire.

use std::borrow::Cow;
use std::sync::LazyLock;

use axum::http::header;
use axum::response::IntoResponse;
use quarry_objfmt::keys::NAME_LEN_MAX;
use quarry_objfmt::{Compression, Durability, Encryption, Suspended};
use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::Problem;
use super::access::Needs;
use super::endpoints::{ENDPOINTS, Endpoint};
use super::error::PROBLEM_JSON;

/// What a schema is made by.
pub(super) type MakeSchema = fn(&mut SchemaGenerator) -> Schema;

/// The schema of `T`.
pub(super) fn of<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// Types of others as they go over the wire.
macro_rules! wire {
    ($($(#[$doc:meta])* $name:ident: $schema:expr;)*) => {
        $(
            $(#[$doc])*
            pub(super) struct $name;

            impl JsonSchema for $name {
                fn inline_schema() -> bool {
                    true
                }

                fn schema_name() -> Cow<'static, str> {
                    stringify!($name).into()
                }

                fn json_schema(_: &mut SchemaGenerator) -> Schema {
                    $schema
                }
            }
        )*
    };
}

wire! {
    /// The name of a tenant, a volume or a snapshot.
    Name: json_schema!({
        "type": "string", "minLength": 1, "maxLength": NAME_LEN_MAX, "pattern": "^[a-z0-9][a-z0-9._-]*$",
    });
    /// A volume's id.
    Uuid: json_schema!({ "type": "string", "format": "uuid" });
    /// See [`Durability`].
    DurabilityWord: words(&[Durability::Local, Durability::Object]);
    /// See [`Compression`].
    CompressionWord: words(&[Compression::None, Compression::Lz4, Compression::Zstd]);
    /// See [`Encryption`].
    EncryptionWord: words(&[Encryption::None, Encryption::Aes256Gcm]);
    /// See [`Suspended`].
    SuspendedWord: words(&[Suspended::ReadOnly, Suspended::Stall]);
}

fn words<T: Serialize>(all: &[T]) -> Schema {
    json_schema!({ "type": "string", "enum": all })
}

/// The document.
static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
});

pub(super) async fn serve() -> impl IntoResponse {
    (
        [(header::CONTENT_TYPE, "application/json")],
        DOCUMENT.as_str(),
    )
}

fn document() -> Value {
    let mut settings = SchemaSettings::draft2020_12();
    settings.definitions_path = "/components/schemas".into();
    settings.meta_schema = None;
    let mut generator = settings.into_generator();
    let problem = json!({
        "description": "What is wrong, and what to do about it.",
        "content": { PROBLEM_JSON: { "schema": generator.subschema_for::<Problem>() } },
    });
    let mut paths = Map::new();
    for endpoint in ENDPOINTS.iter() {
        let operation = operation(endpoint, &mut generator);
        let path = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        path[endpoint.method_name().to_ascii_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Quarry",
            "description": "Block devices whose data live in object storage. Sizes are in bytes; `…_ms` is Unix time, or a span.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
            "version": "1",
        },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "responses": { "Problem": problem },
            "schemas": generator.take_definitions(true),
        },
    })
}

fn operation(endpoint: &Endpoint, generator: &mut SchemaGenerator) -> Value {
    let names = endpoint.path.split('/').filter_map(|part| {
        let name = part.strip_prefix('{')?.strip_suffix('}')?;
        Some((
            name,
            json!({ "name": name, "in": "path", "required": true, "schema": part_of(name) }),
        ))
    });
    let mut parameters: Vec<Value> = names.map(|(_, parameter)| parameter).collect();
    if let Some(query) = endpoint.query {
        parameters.extend(query_parameters(&query(generator), generator));
    }
    let mut answers = Map::new();
    let description = endpoint.about;
    let content = endpoint
        .gives
        .map(|make| json!({ "application/json": { "schema": make(generator) } }));
    for status in endpoint.statuses {
        let mut answer = json!({ "description": description });
        // With 204 comes nothing, also where another status has something.
        if let Some(content) = content.as_ref().filter(|_| *status != 204) {
            answer["content"] = content.clone();
        } else if let Some(media) = endpoint.media {
            answer["content"] = json!({ media: { "schema": { "type": "string" } } });
        }
        answers.insert(status.to_string(), answer);
    }
    let problem = json!({ "$ref": "#/components/responses/Problem" });
    answers.insert("default".to_owned(), problem);
    let mut operation = json!({
        "operationId": operation_id(endpoint),
        "summary": endpoint.about,
        "description": format!("Needs the role {}.", endpoint.needs.as_str()),
        "parameters": parameters,
        "responses": answers,
    });
    if let Some(body) = endpoint.takes {
        let content = json!({ "application/json": { "schema": body(generator) } });
        operation["requestBody"] = json!({ "content": content, "required": true });
    }
    if endpoint.needs == Needs::Nothing {
        operation["security"] = json!([]);
    }
    operation
}

/// What can stand in a path.
fn part_of(name: &str) -> Value {
    match name {
        "volume" => json!({
            "type": "string", "description": "A name; where a snapshot will do, also `name@snapshot` or `name@time`.",
        }),
        "token" => json!({ "type": "string" }),
        _ => Name::json_schema(&mut SchemaGenerator::default()).to_value(),
    }
}

/// The fields of a query's type as parameters.
fn query_parameters(schema: &Schema, generator: &mut SchemaGenerator) -> Vec<Value> {
    let named = schema
        .get("$ref")
        .and_then(Value::as_str)
        .and_then(|at| at.rsplit('/').next());
    let found = match named {
        Some(name) => generator.definitions_mut().remove(name).unwrap_or_default(),
        None => schema.clone().to_value(),
    };
    let fields = found.get("properties").and_then(Value::as_object);
    let field = |(name, schema): (&String, &Value)| json!({ "name": name, "in": "query", "schema": schema });
    fields.into_iter().flatten().map(field).collect()
}

/// Such as `post_volumes_tenant_volume_attach`.
fn operation_id(endpoint: &Endpoint) -> String {
    let words = endpoint
        .path
        .split(['/', '{', '}', '.'])
        .filter(|word| !word.is_empty() && *word != "v1");
    let mut id = endpoint.method_name().to_ascii_lowercase();
    for word in words {
        id.push('_');
        id.push_str(word);
    }
    id
}

#[cfg(test)]
mod tests {
    use super::*;

    /// With `QUARRY_WRITE_OPENAPI=1` it writes the file instead.
    #[test]
    fn document_that_is_checked_in_is_what_the_code_makes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        if std::env::var_os("QUARRY_WRITE_OPENAPI").is_some() {
            std::fs::write(path, DOCUMENT.as_str()).unwrap();
        }
        let there = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            there == *DOCUMENT,
            "run this test with QUARRY_WRITE_OPENAPI=1"
        );
    }

    #[test]
    fn document_names_every_endpoint_and_defines_what_it_refers_to() {
        let document = document();
        for endpoint in ENDPOINTS.iter() {
            let method = endpoint.method_name().to_ascii_lowercase();
            assert!(
                document["paths"][endpoint.path][method].is_object(),
                "{}",
                endpoint.path
            );
        }
        let text = document.to_string();
        for reference in text.split("\"$ref\":\"#").skip(1) {
            let pointer = reference.split('"').next().unwrap();
            assert!(document.pointer(pointer).is_some(), "{pointer}");
        }
    }
}

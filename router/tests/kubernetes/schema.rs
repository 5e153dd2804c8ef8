//! Checks objects against the schemas of CustomResourceDefinitions, as an API server does, as far as ours go.

use serde_json::Value as Json;

/// What is wrong with `value` at `path`. A field that a server would prune is wrong too.
pub fn faults(schema: &Json, value: &Json, path: &str) -> Vec<String> {
    let mut faults = Vec::new();
    for keyword in schema.as_object().expect("a schema").keys() {
        let known = [
            "type",
            "required",
            "properties",
            "additionalProperties",
            "items",
            "enum",
            "format",
            "minimum",
            "maximum",
            "minLength",
            "maxLength",
            "minItems",
            "maxItems",
        ];
        assert!(
            known.contains(&keyword.as_str()) || keyword.starts_with("x-kubernetes-"),
            "{keyword} is not checked"
        );
    }
    let fits = match schema["type"].as_str().expect("a type") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_i64() || value.is_u64(),
        "boolean" => value.is_boolean(),
        other => panic!("{other} is not checked"),
    };
    if !fits {
        return vec![format!("{path} is {value}, not of type {}", schema["type"])];
    }
    if let Some(allowed) = schema["enum"].as_array()
        && !allowed.contains(value)
    {
        faults.push(format!("{path} is {value}, none of {allowed:?}"));
    }
    faults.extend(size_faults(schema, value, path));
    faults.extend(member_faults(schema, value, path));
    for (index, item) in value.as_array().into_iter().flatten().enumerate() {
        faults.extend(self::faults(
            &schema["items"],
            item,
            &format!("{path}[{index}]"),
        ));
    }
    faults
}

fn size_faults(schema: &Json, value: &Json, path: &str) -> Vec<String> {
    let mut faults = Vec::new();
    let size = match value {
        Json::Number(number) => number.as_i64(),
        Json::String(text) => i64::try_from(text.chars().count()).ok(),
        Json::Array(items) => i64::try_from(items.len()).ok(),
        _ => None,
    };
    for (least, most) in [
        ("minimum", "maximum"),
        ("minLength", "maxLength"),
        ("minItems", "maxItems"),
    ] {
        let below = schema[least]
            .as_i64()
            .is_some_and(|least| size < Some(least));
        let above = schema[most].as_i64().is_some_and(|most| size > Some(most));
        if below || above {
            faults.push(format!("{path} is {value}, outside {least} or {most}"));
        }
    }
    faults
}

fn member_faults(schema: &Json, value: &Json, path: &str) -> Vec<String> {
    let mut faults = Vec::new();
    if let Some(members) = value.as_object() {
        for name in schema["required"].as_array().into_iter().flatten() {
            if members
                .get(name.as_str().unwrap())
                .is_none_or(Json::is_null)
            {
                faults.push(format!("{path}.{} is missing", name.as_str().unwrap()));
            }
        }
        for (name, member) in members {
            let path = format!("{path}.{name}");
            if let Some(inner) = schema["properties"].get(name) {
                faults.extend(self::faults(inner, member, &path));
            } else if schema["additionalProperties"].is_object() {
                faults.extend(self::faults(&schema["additionalProperties"], member, &path));
            } else if schema["x-kubernetes-preserve-unknown-fields"] != true
                && schema.get("properties").is_some()
            {
                faults.push(format!("{path} would be pruned"));
            }
        }
    }
    faults
}

/// The schema for `object` among `definitions`.
pub fn schema_of<'a>(definitions: &'a [Json], object: &Json) -> Option<&'a Json> {
    let api = object["apiVersion"].as_str()?;
    definitions.iter().find_map(|definition| {
        let spec = &definition["spec"];
        let version = spec["versions"].as_array()?.iter().find(|version| {
            api == format!(
                "{}/{}",
                spec["group"].as_str().unwrap(),
                version["name"].as_str().unwrap()
            )
        })?;
        (spec["names"]["kind"] == object["kind"]).then_some(&version["schema"]["openAPIV3Schema"])
    })
}

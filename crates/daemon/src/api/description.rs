//! What is said of every operation in the API's description.

use purlin_api::ErrorBody;
use utoipa::{
    Modify, ToSchema,
    openapi::{
        ContentBuilder, OpenApi, Ref, RefOr, Response, ResponseBuilder,
        path::Operation,
        security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme},
    },
};

/// The name of the security scheme.
const SCHEME: &str = "token";

/// That on TCP it takes a token, what every operation may answer, and names that are of one operation each.
pub struct Everywhere;

impl Modify for Everywhere {
    fn modify(&self, api: &mut OpenApi) {
        let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).description(Some(
            "On TCP: a token that 'purlin token create' has made. At the Unix socket it takes none.",
        ));
        let components = api.components.get_or_insert_default();
        components.add_security_scheme(SCHEME, SecurityScheme::Http(bearer.build()));
        let none: [&str; 0] = [];
        api.security = Some(vec![SecurityRequirement::new(SCHEME, none), SecurityRequirement::default()]);
        for item in api.paths.paths.values_mut() {
            let operations = [&mut item.get, &mut item.put, &mut item.post, &mut item.patch, &mut item.delete];
            operations.into_iter().flatten().for_each(complete);
        }
    }
}

fn complete(operation: &mut Operation) {
    // Each function has a name of its own in its module, and a module is a tag.
    if let (Some(id), Some(tag)) = (&mut operation.operation_id, operation.tags.iter().flatten().next()) {
        *id = format!("{tag}_{id}");
    }
    let mut add = |status: &str, what: &str| {
        operation.responses.responses.entry(status.into()).or_insert_with(|| RefOr::T(error(what)));
    };
    add("401", "on TCP, without a token that there is");
    if operation.request_body.is_some() {
        add("408", "the body did not arrive in time");
    }
}

fn error(what: &str) -> Response {
    let schema = Ref::from_schema_name(ErrorBody::name());
    let content = ContentBuilder::new().schema(Some(RefOr::Ref(schema))).build();
    ResponseBuilder::new().description(what).content("application/json", content).build()
}

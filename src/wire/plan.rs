//! What each leg gets of a client's request: which fields are cut, replaced and added.
//!
//! All other bytes are the client's. What is taken from prefill's response is decided with the shape of the
//! body ([`shape`](super::shape)); which servers the legs run on is not known here.

use bytes::{BufMut, Bytes, BytesMut};

use super::body::ClientBody;
use super::bootstrap::BootstrapFields;
use super::shape::{BodyEdit, BodyFields, ChangedField, FieldChange, ManySamples};
use crate::http1::OutgoingBody;

/// What one leg gets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LegPlan {
    edit: BodyEdit,
    /// Fields that are added besides the bootstrap fields, each with a comma before it.
    added: Bytes,
}

impl LegPlan {
    /// A leg whose body has these changes, and `added` fields, each with a comma before it.
    pub(crate) fn new(
        fields: &BodyFields,
        change: impl Fn(ChangedField) -> FieldChange,
        added: Bytes,
    ) -> Self {
        Self { edit: fields.edit(change), added }
    }
}

/// What both legs get.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct RequestPlan {
    prefill: LegPlan,
    /// `None`: the same as prefill, so that the bytes are put together once.
    decode: Option<LegPlan>,
}

/// Ids that the router sets, each as it stands between the quotes of JSON: because the client has none, or
/// because each copy of a request for several samples needs one of its own.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct OwnIds<'a> {
    /// The id by which servers can be asked to abort the request.
    pub(crate) rid: Option<&'a str>,
    /// The id of the response, which the servers of `/v1/responses` would draw for themselves.
    pub(crate) request_id: Option<&'a str>,
}

/// Data-parallel ranks that servers are told, because they do not follow the room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ToldRanks {
    /// Of the prefill server; the decode server must know it, too.
    pub(crate) prefill: Option<u16>,
    pub(crate) decode: Option<u16>,
}

impl ToldRanks {
    pub(crate) fn is_none(self) -> bool {
        self == Self::default()
    }

    /// What is added to prefill's and to decode's body, each field with a comma before it. The field for the
    /// other server's rank also keeps prefill from looking for its rank in the room.
    fn fields(self) -> [String; 2] {
        let routed = |rank: Option<u16>| rank.map(|rank| format!(r#","routed_dp_rank":{rank}"#));
        let computed = self.prefill.map(|rank| format!(r#","disagg_prefill_dp_rank":{rank}"#));
        [self.prefill, self.decode].map(|own| routed(own).into_iter().chain(computed.clone()).collect())
    }
}

impl RequestPlan {
    /// SGLang's protocol: both legs get the same body, without the client's internal fields.
    pub(crate) fn sglang(fields: &BodyFields, ids: OwnIds<'_>) -> Self {
        Self::with_ids(fields, ids, |field| match field {
            ChangedField::Internal => FieldChange::Cut,
            ChangedField::Rid | ChangedField::RequestId => FieldChange::Keep,
            ChangedField::Samples | ChangedField::SamplingParams => FieldChange::Keep,
        })
    }

    /// The same for one of the copies of a request for several samples: it asks for one.
    pub(crate) fn sglang_sample(fields: &BodyFields, samples: &ManySamples, ids: OwnIds<'_>) -> Self {
        Self::with_ids(fields, ids, |field| match field {
            ChangedField::Internal | ChangedField::Samples => FieldChange::Cut,
            ChangedField::SamplingParams => FieldChange::Replace(samples.sampling_params.clone()),
            // A server takes an id only once at a time. A regular one draws new ids for all samples.
            ChangedField::Rid => FieldChange::Cut,
            ChangedField::RequestId => FieldChange::Keep,
        })
    }

    /// Both legs with these changes, but for own ids in place of the client's.
    fn with_ids(fields: &BodyFields, ids: OwnIds<'_>, change: impl Fn(ChangedField) -> FieldChange) -> Self {
        let change = |field| {
            let id = match field {
                ChangedField::Rid => ids.rid,
                ChangedField::RequestId => ids.request_id,
                _ => None,
            };
            id.map_or_else(|| change(field), |id| FieldChange::Replace(format!("\"{id}\"").into()))
        };
        let mut added = BytesMut::new();
        for (field, name, id) in
            [(ChangedField::Rid, "rid", ids.rid), (ChangedField::RequestId, "request_id", ids.request_id)]
        {
            // Otherwise it is in place of the client's null: some servers refuse two fields of one name.
            if let Some(id) = id.filter(|_| !fields.has(field)) {
                for part in [",\"", name, "\":\"", id, "\""] {
                    added.put_slice(part.as_bytes());
                }
            }
        }
        Self { prefill: LegPlan::new(fields, change, added.freeze()), decode: None }
    }

    /// Another leg for prefill than for decode.
    #[cfg(test)]
    pub(crate) fn of_prefill(prefill: LegPlan) -> Self {
        Self { prefill, decode: Some(LegPlan::default()) }
    }

    /// The client's body as it is.
    pub(crate) fn untouched() -> Self {
        Self { prefill: LegPlan::default(), decode: None }
    }

    /// The body for a plain server, without bootstrap fields.
    pub(crate) fn single_body(&self, body: &ClientBody) -> OutgoingBody {
        body.cut(&self.prefill.edit)
    }

    /// The bodies of prefill's and of decode's leg.
    pub(crate) fn bodies(&self, body: &ClientBody, bootstrap: &BootstrapFields, room: u64) -> LegBodies {
        let of = |leg: &LegPlan| body.edited(&leg.edit, bootstrap, room, &leg.added);
        LegBodies { prefill: of(&self.prefill), decode: self.decode.as_ref().map(of) }
    }

    /// The same with fields that tell the servers their ranks.
    pub(crate) fn bodies_with_ranks(
        &self,
        body: &ClientBody,
        bootstrap: &BootstrapFields,
        room: u64,
        ranks: ToldRanks,
    ) -> LegBodies {
        let [for_prefill, for_decode] = ranks.fields();
        let with = |leg: &LegPlan, fields: String| {
            body.edited(&leg.edit, bootstrap, room, &[&leg.added, fields.as_bytes()].concat())
        };
        let decode = self.decode.as_ref().unwrap_or(&self.prefill);
        LegBodies { prefill: with(&self.prefill, for_prefill), decode: Some(with(decode, for_decode)) }
    }
}

/// The bodies of both legs.
pub(crate) struct LegBodies {
    prefill: OutgoingBody,
    decode: Option<OutgoingBody>,
}

impl LegBodies {
    pub(crate) fn prefill(&self) -> &OutgoingBody {
        &self.prefill
    }

    pub(crate) fn decode(&self) -> &OutgoingBody {
        self.decode.as_ref().unwrap_or(&self.prefill)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decode_is_told_the_rank_of_prefill_and_its_own() {
        let fields = |prefill, decode| ToldRanks { prefill, decode }.fields();
        assert_eq!(
            fields(Some(3), Some(0)),
            [
                r#","routed_dp_rank":3,"disagg_prefill_dp_rank":3"#,
                r#","routed_dp_rank":0,"disagg_prefill_dp_rank":3"#
            ]
        );
        assert_eq!(
            fields(Some(3), None),
            [r#","routed_dp_rank":3,"disagg_prefill_dp_rank":3"#, r#","disagg_prefill_dp_rank":3"#]
        );
        assert_eq!(fields(None, Some(1)), ["", r#","routed_dp_rank":1"#]);
    }
}

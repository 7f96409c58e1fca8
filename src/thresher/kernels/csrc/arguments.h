// The arguments of a kernel's function: one struct, passed by its address.
//
// A struct lists its fields once, in a macro that gets another macro to apply to each: FIELD(type, name). From the list
// come both the members and the description that Python builds the same struct from (calling.py). A field is a pointer
// to the elements of a contiguous tensor, an int64_t, a double, or a struct whose fields are listed in the same way.

#pragma once

#include <cstdint>
#include <string>
#include <type_traits>

#include "bf16.h"

namespace thresher {

template <class T>
constexpr const char* KIND = nullptr;  // its name in Python
template <> inline constexpr const char* KIND<int64_t> = "int64";
template <> inline constexpr const char* KIND<double> = "float64";
template <> inline constexpr const char* KIND<uint8_t*> = "bool*";
template <> inline constexpr const char* KIND<int8_t*> = "int8*";
template <> inline constexpr const char* KIND<int16_t*> = "int16*";
template <> inline constexpr const char* KIND<int32_t*> = "int32*";
template <> inline constexpr const char* KIND<int64_t*> = "int64*";
template <> inline constexpr const char* KIND<Bf16*> = "bfloat16*";
template <> inline constexpr const char* KIND<float*> = "float32*";
template <> inline constexpr const char* KIND<double*> = "float64*";

// A pointer to mutable elements; other types unchanged.
template <class F>
using Plain = std::conditional_t<std::is_pointer_v<F>, std::remove_const_t<std::remove_pointer_t<F>>*, F>;

#define THRESHER_MEMBER(type, name) type name;
#define THRESHER_VISIT(type, name) visit(#name, this->name);
#define THRESHER_FIELDS(LIST)                                               \
    LIST(THRESHER_MEMBER)                                                   \
    template <class Visit>                                                  \
    void visit_fields(Visit& visit) const { LIST(THRESHER_VISIT) }

// A line for each field, those of a struct inside included: name, kind, offset and size.
struct Description {
    const char* begin;  // of the outermost struct
    std::string text;

    template <class F>
    void operator()(const char* name, const F& field) {
        if constexpr (std::is_class_v<F>) {
            field.visit_fields(*this);
        } else {
            static_assert(KIND<Plain<F>> != nullptr, "Python knows no such type of a field");
            const auto offset = reinterpret_cast<const char*>(&field) - begin;
            text += std::string(name) + " " + KIND<Plain<F>> + " " + std::to_string(offset) + " " +
                    std::to_string(sizeof field) + "\n";
        }
    }
};

template <class Arguments>
std::string describe() {
    const Arguments arguments{};
    Description description{reinterpret_cast<const char*>(&arguments), {}};
    arguments.visit_fields(description);
    return description.text + std::to_string(sizeof arguments);
}

// Export function(Arguments<S>) as function_NAME, with the description of its struct.
//
// Functions take the struct by value: the compiler keeps the fields of a private copy in registers, which saves up to
// 8 % of the time of top-k's gradients. The text belongs to the exported function, since all libraries of a process
// share the variables of templates, and their structs may differ.
#define THRESHER_EXPORT(function, Arguments, S, NAME)                                              \
    extern "C" void function##_##NAME(const Arguments<S>* arguments) { function(*arguments); }     \
    extern "C" const char* describe_##function##_##NAME() {                                        \
        static const std::string text = thresher::describe<Arguments<S>>();                        \
        return text.c_str();                                                                       \
    }

}  // namespace thresher
